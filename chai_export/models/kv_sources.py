"""Which layers of a model read the keys and values of an earlier layer (Cross-Layer Attention).

Modules have no common way to say so: transformers' Gemma 3n and 4 mark theirs ``is_kv_shared_layer`` and keep
the source in a dictionary by layer type, others hand tensors on. So the model is run once on two tokens, and
a layer that attends to the very tensors of an earlier one reads that one's cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from chai_export.errors import ChaiError
from chai_export.models.attention import attention_of, causal_attention
from chai_export.models.geometry import Geometry, describe
from chai_export.models.scoring import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KNOWN: WeakKeyDictionary[Any, tuple[int, ...] | None] = WeakKeyDictionary()


def describe_model(model: PreTrainedModel) -> Geometry:
    """Geometry of a loaded model, with the layers that share a cache.

    Raises:
        ChaiError: as :func:`~chai_export.models.geometry.describe` and
            :func:`~chai_export.models.attention.attention_of`.
    """
    return replace(describe(model.config), kv_source_layers=kv_source_layers(model))


def kv_source_layers(model: PreTrainedModel) -> tuple[int, ...] | None:
    """For each layer the one whose keys and values it reads, itself or an earlier one; None if all have own.

    Runs the model once; later calls remember.

    Raises:
        ChaiError: a layer reads the keys of one layer and the values of another, or has other heads than the
            configuration says.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _observe(model)
    return _KNOWN[model]


def _observe(model: PreTrainedModel) -> tuple[int, ...] | None:
    geometry = describe(model.config)
    # Held until the end, so that no address is used twice.
    seen: list[tuple[Tensor, Tensor]] = []
    sources: list[int] = []

    def layer(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        _require_heads(geometry, index, query, key, value)
        same_key = _first_same(key, [k for k, _ in seen])
        same_value = _first_same(value, [v for _, v in seen])
        if same_key != same_value:
            raise ChaiError(
                f"layer {index} shares keys or values with an earlier layer but not both, which the op "
                "cannot express; choose a model whose layers share both or neither"
            )
        seen.append((key, value))
        sources.append(index if same_key is None else same_key)
        group = query.shape[1] // key.shape[1]
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
        return causal_attention(query, keys, values, scoring)

    with attention_of(model, layer), torch.inference_mode():
        model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    return None if sources == list(range(len(sources))) else tuple(sources)


def _require_heads(geometry: Geometry, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless a layer's heads are those of every layer: caches and head maps are of one size."""
    expected = (geometry.num_query_heads, geometry.num_kv_heads, geometry.head_dim, geometry.value_head_dim)
    found = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
    if found != expected:
        text = "{} query heads and {} KV heads of {} (keys) and {} (values)"
        raise ChaiError(
            f"layer {layer} of this {geometry.model_type} model has {text.format(*found)}, not "
            f"{text.format(*expected)}; choose a model with the same heads in every layer"
        )


def _first_same(tensor: Tensor, earlier: list[Tensor]) -> int | None:
    """Index of the first earlier tensor that lies in the same memory in the same way."""
    place = (tensor.data_ptr(), tensor.shape, tensor.stride())
    for index, other in enumerate(earlier):
        if (other.data_ptr(), other.shape, other.stride()) == place:
            return index
    return None
