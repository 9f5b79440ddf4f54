"""Which layer's K and V cache each layer reads, as numbers: ``kv_source_layers``.

Entry i is the layer whose cache layer i reads: i itself for a layer with a cache (a producer), an earlier
producer for a layer without (a consumer, see docs/op.md). None stands for a cache in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


def owners(sources: Sequence[int] | None, num_layers: int) -> list[int]:
    """The layers that have a cache, ascending."""
    if sources is None:
        return list(range(num_layers))
    return [layer for layer, source in enumerate(sources) if layer == source]


def readers(sources: Sequence[int] | None, num_layers: int) -> list[list[int]]:
    """For each layer with a cache, in order: all layers that read it, itself first."""
    members: dict[int, list[int]] = {}
    for layer, source in enumerate(range(num_layers) if sources is None else sources):
        members.setdefault(source, []).append(layer)
    return list(members.values())


def for_each_layer(of_caches: Sequence[Value], sources: Sequence[int] | None, num_layers: int) -> list[Value]:
    """What is given once for each cache, repeated for each layer that reads it."""
    of_owner = dict(zip(owners(sources, num_layers), of_caches, strict=True))
    return [of_owner[source] for source in (range(num_layers) if sources is None else sources)]


def check_sources(sources: Sequence[int], num_layers: int) -> None:
    """Raise ValueError unless every layer reads its own cache or that of an earlier layer which has one."""
    if len(sources) != num_layers:
        raise ValueError(f"kv_source_layers has {len(sources)} numbers for {num_layers} layers")
    for layer, source in enumerate(sources):
        if not 0 <= source <= layer or sources[source] != source:
            raise ValueError(f"layer {layer} reads the cache of layer {source}, which has none before it")


def check_same_kept(kept_heads: Sequence[int], sources: Sequence[int]) -> None:
    """Raise ValueError unless the layers that read one cache keep the same number of KV heads."""
    for layer, source in enumerate(sources):
        if kept_heads[layer] != kept_heads[source]:
            raise ValueError(
                f"layer {layer} keeps {kept_heads[layer]} KV heads and reads the cache of layer {source}, "
                f"which keeps {kept_heads[source]}; they must be equal"
            )
