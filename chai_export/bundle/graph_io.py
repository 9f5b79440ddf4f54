"""The inputs and outputs of a bundle's graph: names, types and sizes, made from its manifest.

Whoever writes, checks, feeds or binds a graph asks here; docs/how-it-works.md shows the same as a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chai_export.op.cache_storage import CacheStorage

INPUT_IDS = "input_ids"
LENGTHS = "lengths"
PAST_LENGTHS = "past_lengths"
OUTPUT_POSITIONS = "output_positions"
ROPE_LENGTHS = "rope_lengths"
PAGE_TABLE = "page_table"
HEAD_MAP = "head_map"
LOGITS = "logits"
PRESENT_HEAD_MAP = "present_head_map"

BATCH, TOKENS, OUTPUTS = "batch", "tokens", "outputs"
"""Sizes that a call decides: B, S, and the number of logits per row. So is the R of a K cache, see
:func:`kept_heads`."""

PAGES, ROW_PAGES, PAGE_LENGTH = "pages", "row_pages", "page_length"
"""Sizes that the runner chooses: the N, M and L of docs/op.md. Layers with a window have pools of their own
size, see :func:`pool_pages`, and a page table of their own, see :func:`page_table`."""

_SCALES = "_scales"


def past_key(layer: int) -> str:
    """Name of the input with a layer's K cache."""
    return f"past_key.{layer}"


def past_value(layer: int) -> str:
    """Name of the input with a layer's V cache."""
    return f"past_value.{layer}"


def present_key(layer: int) -> str:
    """Name of the output with a layer's K cache."""
    return f"present_key.{layer}"


def present_value(layer: int) -> str:
    """Name of the output with a layer's V cache."""
    return f"present_value.{layer}"


def page_table(window: int) -> str:
    """Name of the input with the pages of the layers that have this window; 0: of those that have none."""
    return f"{PAGE_TABLE}.{window}" if window else PAGE_TABLE


def pool_pages(window: int) -> str:
    """The size N of the pools of the layers that have this window; 0: of those that have none."""
    return f"{PAGES}_{window}" if window else PAGES


def scales(cache: str) -> str:
    """Name of the scales of a quantised cache, by its own: ``past_key.3`` has ``past_key_scales.3``."""
    kind, layer = cache.split(".")
    return f"{kind}{_SCALES}.{layer}"


def kept_heads(layer: int) -> str:
    """The size R of a layer's K cache, which a call decides too."""
    return f"kept_heads_{layer}"


@dataclass(frozen=True)
class GraphValue:
    """One input or output.

    ``dtypes`` are names of :data:`~chai_export.op.dtypes.ELEMENT_TYPES`, of which a graph has one. ``dims``
    are numbers, or symbols for sizes that a call decides.
    """

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[int | str, ...]

    @property
    def dtype(self) -> str:
        """The first of ``dtypes``, for values that can have but one."""
        return self.dtypes[0]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Dims with numbers for the symbols."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)


@dataclass(frozen=True)
class CacheIO:
    """A cache that is read as ``past`` and written as ``present``; ``window`` is its layer's, 0 for none."""

    layer: int
    window: int
    past: GraphValue
    present: GraphValue


@dataclass(frozen=True)
class GraphIO:
    """All inputs and outputs.

    ``step`` are the inputs that change with every call. ``caches`` are, layer by layer, K, V, the scales of K
    and those of V, where there are any.
    """

    step: tuple[GraphValue, ...]
    head_map: GraphValue
    logits: GraphValue
    present_head_map: GraphValue
    caches: tuple[CacheIO, ...]

    @property
    def inputs(self) -> list[GraphValue]:
        """In the order of the graph."""
        return [*self.step, self.head_map, *(cache.past for cache in self.caches)]

    @property
    def outputs(self) -> list[GraphValue]:
        """In the order of the graph."""
        return [self.logits, self.present_head_map, *(cache.present for cache in self.caches)]

    def difference(self, given: Mapping[str, tuple[str, Sequence[int | str | None]]]) -> str | None:
        """Where a graph differs, in words, or None.

        Args:
            given: element type (as :data:`~chai_export.op.dtypes.ELEMENT_TYPES` names it) and dims of each
                input and output by name; dims that are no numbers go with any.
        """
        expected = {value.name: value for value in (*self.inputs, *self.outputs)}
        missing, extra = sorted(expected.keys() - given), sorted(given.keys() - expected)
        if missing or extra:
            found = (("lacks", missing), ("has", extra))
            return "it " + " and ".join(f"{verb} {', '.join(names[:3])}" for verb, names in found if names)
        for name, value in expected.items():
            dtype, dims = given[name]
            if dtype not in value.dtypes or not _fits(dims, value.dims):
                wanted = ["?" if isinstance(dim, str) else dim for dim in value.dims]
                return f"{name} is {dtype} {list(dims)} and should be {' or '.join(value.dtypes)} {wanted}"
        return None


def graph_io(
    storage: CacheStorage,
    vocab_size: int,
    *,
    windows: Sequence[int] | None = None,
    rope_lengths: bool = False,
) -> GraphIO:
    """Inputs and outputs of a graph with these heads and caches; its logits may be float32.

    Args:
        storage: heads, and what their caches hold.
        vocab_size: columns of the logits.
        windows: of each layer, 0 for none; None: no layer has one.
        rope_lengths: rows choose their rotary factors by an input of this name.
    """
    dtype, heads = str(storage.dtype), storage.heads
    maps = (heads.num_layers, BATCH, heads.num_query_heads)
    window_of = windows or [0] * heads.num_layers
    groups = sorted({window_of[layer] for layer in heads.cache_layers})
    return GraphIO(
        step=(
            GraphValue(INPUT_IDS, ("int64",), (BATCH, TOKENS)),
            GraphValue(LENGTHS, ("int32",), (BATCH,)),
            GraphValue(PAST_LENGTHS, ("int32",), (BATCH,)),
            GraphValue(OUTPUT_POSITIONS, ("int64",), (BATCH, OUTPUTS)),
            *([GraphValue(ROPE_LENGTHS, ("int32",), (BATCH,))] if rope_lengths else []),
            *(GraphValue(page_table(window), ("int32",), (BATCH, ROW_PAGES)) for window in groups),
        ),
        head_map=GraphValue(HEAD_MAP, ("int32",), maps),
        logits=GraphValue(LOGITS, tuple(dict.fromkeys((dtype, "float32"))), (BATCH, OUTPUTS, vocab_size)),
        present_head_map=GraphValue(PRESENT_HEAD_MAP, ("int32",), maps),
        caches=tuple(
            cache for layer in heads.cache_layers for cache in _caches(storage, layer, window_of[layer])
        ),
    )


def _caches(storage: CacheStorage, layer: int, window: int) -> list[CacheIO]:
    """Of one layer."""
    found, of_scales = [], []
    for past, present, heads, held in (
        (past_key(layer), present_key(layer), kept_heads(layer), storage.key(layer)),
        (past_value(layer), present_value(layer), storage.heads.num_kv_heads, storage.value(layer)),
    ):
        sizes = (pool_pages(window), heads, PAGE_LENGTH)
        found.append(_cache(layer, window, past, present, storage.element(held), (*sizes, held.columns)))
        if held.quantised:
            names = scales(past), scales(present)
            of_scales.append(_cache(layer, window, *names, "float16", (*sizes, held.scale_columns)))
    return found + of_scales


def _cache(
    layer: int, window: int, past: str, present: str, dtype: str, dims: tuple[int | str, ...]
) -> CacheIO:
    return CacheIO(layer, window, GraphValue(past, (dtype,), dims), GraphValue(present, (dtype,), dims))


def pool_sizes(io: GraphIO, pages: int) -> dict[str, int]:
    """Sizes of all pools by symbol, where each has as many pages."""
    return {pool_pages(cache.window): pages for cache in io.caches}


def kept_sizes(kept: Sequence[int]) -> dict[str, int]:
    """Sizes of the K caches by symbol, for kept KV heads by layer."""
    return {kept_heads(layer): number for layer, number in enumerate(kept)}


def _fits(dims: Sequence[int | str | None], wanted: Sequence[int | str]) -> bool:
    return len(dims) == len(wanted) and all(
        not isinstance(have, int) or not isinstance(want, int) or have == want
        for have, want in zip(dims, wanted, strict=True)
    )
