"""Which graph input is what, and the sizes that symbolic dims take when a part of the graph is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from chai_export.errors import ChaiError
from chai_export.graph.match.miss import DYNAMIC
from chai_export.graph.match.site import AttentionSite
from chai_export.graph.read.constants import rank, static_dim

Array = NDArray[Any]


@dataclass(frozen=True)
class Sizes:
    """Batch rows, new tokens and past tokens of one evaluation."""

    batch: int
    tokens: int
    past: int

    @property
    def total(self) -> int:
        """Past and new tokens."""
        return self.past + self.tokens


@dataclass(frozen=True)
class Roles:
    """The inputs of a decoder: token ids and caches, and others that may be absent.

    Caches of a ``fixed`` size come with inputs that say where new rows go: ``cache_position`` [S] for all
    batch rows, or ``write_indices`` [B]; ``valid_lengths`` [B] counts the tokens in the cache once they are
    written. ``batch`` is 1 if the graph was exported for one row. ``cache_sizes`` are heads and head dim of
    the caches whose attention matched.
    """

    input_ids: ir.Value
    attention_mask: ir.Value | None
    position_ids: ir.Value | None
    caches: tuple[ir.Value, ...]
    cache_position: ir.Value | None = None
    write_indices: ir.Value | None = None
    valid_lengths: ir.Value | None = None
    fixed: bool = False
    batch: int | None = None
    cache_sizes: Mapping[ir.Value, tuple[int, int]] = field(default_factory=dict)

    def fit(self, sizes: Sizes) -> Sizes:
        """The same sizes with as many rows as the graph takes."""
        return sizes if self.batch is None else replace(sizes, batch=self.batch)

    @property
    def capacity(self) -> int | None:
        """Rows of the fixed caches, if the graph states it."""
        return static_dim(self.caches[0], 2) if self.fixed and self.caches else None

    def cache_rows(self, sizes: Sizes) -> int:
        """Rows of a cache input: the past, or all that a fixed cache has room for."""
        return (self.capacity or sizes.total) if self.fixed else sizes.past

    def columns(self, sizes: Sizes) -> int:
        """Keys that a query is scored with: all in the cache, or all that it has room for."""
        return self.cache_rows(sizes) if self.fixed else sizes.total

    def feeds(self, sizes: Sizes, valid: Array) -> dict[ir.Value, Array]:
        """Arrays for every input but the caches.

        Args:
            sizes: batch, new and past tokens.
            valid: int64 [B, past + S], 0 where a token is padding. Padded new tokens on the right take the
                position of the last valid one.
        """
        steps = np.arange(sizes.tokens)
        new = valid[:, sizes.past :] != 0
        last = np.where(new, steps, -1).max(axis=1, initial=-1, keepdims=True)
        positions = sizes.past + np.minimum(steps, np.maximum(last, 0))
        arrays = {
            self.input_ids: np.ones((sizes.batch, sizes.tokens), np.int64),
            self.attention_mask: self._mask(sizes, valid),
            self.position_ids: positions.astype(np.int64),
            self.cache_position: np.arange(sizes.past, sizes.total, dtype=np.int64),
            self.write_indices: np.full(sizes.batch, sizes.past, np.int64),
            self.valid_lengths: (sizes.past + last[:, 0] + 1).astype(np.int64),
        }
        return {value: array for value, array in arrays.items() if value is not None}

    def _mask(self, sizes: Sizes, valid: Array) -> Array:
        """The attention mask, as wide as the graph wants it."""
        width = static_dim(self.attention_mask, 1) or sizes.total
        return np.pad(valid, ((0, 0), (0, max(0, width - sizes.total))))

    def cache_array(self, cache: ir.Value, sizes: Sizes, rows: Array | None = None) -> Array:
        """Zeros for a cache, with the past rows [B,G,P,D] given in front."""
        heads, dim = self.cache_sizes[cache]
        array = np.zeros((sizes.batch, heads, self.cache_rows(sizes), dim), np.float32)
        if rows is not None:
            array[:, :, : sizes.past] = rows
        return array

    def symbols(self, sizes: Sizes) -> dict[str, int]:
        """The number that each dim name of an input stands for."""
        known: dict[str, int] = {}
        expected = [
            (self.attention_mask, {0: sizes.batch, 1: sizes.total}),
            *((cache, {0: sizes.batch, 2: self.cache_rows(sizes)}) for cache in self.caches),
            (self.position_ids, {0: sizes.batch, 1: sizes.tokens}),
            (self.input_ids, {0: sizes.batch, 1: sizes.tokens}),
        ]
        for value, dims in expected:
            if value is None or value.shape is None:
                continue
            for axis, size in dims.items():
                dim = value.shape[axis] if axis < len(value.shape) else None
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isidentifier():
                    known[dim.value] = size
        return known

    def dims(self, value: ir.Value, sizes: Sizes) -> list[int | None] | None:
        """The shape of any value under ``sizes``; unknown dims are None, an unknown rank gives None."""
        if value.shape is None:
            return None
        symbols = self.symbols(sizes)
        result: list[int | None] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                result.append(dim)
            elif value in self.caches and axis in (0, 2):
                result.append(sizes.batch if axis == 0 else self.cache_rows(sizes))
            elif value in self.cache_sizes:
                result.append(self.cache_sizes[value][axis // 2])
            else:
                result.append(_evaluate(dim, symbols))
        return result


def _evaluate(dim: ir.SymbolicDim, symbols: dict[str, int]) -> int | None:
    if dim.value is None:
        return None
    if dim.value in symbols:
        return symbols[dim.value]
    try:
        if not {str(symbol) for symbol in dim.free_symbols()} <= set(symbols):
            return None
        result = dim.evaluate(symbols)
    except (ValueError, TypeError, AttributeError):
        return None  # not an expression: exporters may write any text as a name
    return result if isinstance(result, int) else None


def find_roles(graph: ir.Graph, caches: Iterable[ir.Value], sites: Sequence[AttentionSite] = ()) -> Roles:
    """Tell the graph's inputs apart by name and rank, caches and places in them by the sites that use them.

    Raises:
        ChaiError: there are no token ids, or an input is none of the known ones.
    """
    known = tuple(dict.fromkeys(caches))
    rest = [value for value in graph.inputs if value not in known]
    named = {value.name: value for value in rest}
    input_ids = named.pop("input_ids", None)
    if input_ids is None or rank(input_ids) not in (None, 2):
        raise ChaiError(
            "the graph has no input named input_ids of shape [batch, tokens]; "
            "export a decoder-only text model with its token ids as input"
        )
    batch = static_dim(input_ids, 0)
    attention_mask = named.pop("attention_mask", None)
    position_ids = named.pop("position_ids", None)
    cache_position = _vector(named, "cache_position", "ScatterND", 1)
    write_indices = _vector(named, "write_indices", "TensorScatter", 2)
    valid_lengths = _vector(named, "nonpad_kv_seqlen", "Attention", 6)
    # Inputs that nothing uses do no harm.
    unknown = [name for name, value in named.items() if value.uses()]
    if unknown:
        raise ChaiError(
            f"the graph has inputs that the rewrite does not know ({', '.join(map(str, unknown))}); "
            "export with input_ids, attention_mask, position_ids and past key/values only"
        )
    fixed = {cache.fixed for site in sites for cache in (site.key, site.value)}
    if len(fixed) > 1:
        raise ChaiError("some caches grow and others have a fixed size; export all layers in one way")
    return Roles(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        caches=known,
        cache_position=cache_position,
        write_indices=write_indices,
        valid_lengths=valid_lengths,
        fixed=True in fixed,
        batch=batch,
        cache_sizes={
            cache.past: (site.heads.num_kv_heads, dim)
            for site in sites
            for cache, dim in ((site.key, site.heads.head_dim), (site.value, site.heads.value_head_dim))
        },
    )


def require_free_sizes(graph: ir.Graph) -> None:
    """Refuse graphs for calls of one size; a batch of one row can be mended.

    Raises:
        ChaiError: the number of tokens is fixed, or that of rows to more than one.
    """
    input_ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    rows, tokens = static_dim(input_ids, 0), static_dim(input_ids, 1)
    if tokens is not None or rows not in (None, 1):
        shape = f"[{rows or 'batch'}, {tokens or 'tokens'}]"
        raise ChaiError(f"the graph takes input_ids of shape {shape} only; {DYNAMIC}")


def _vector(named: dict[str | None, ir.Value], name: str, reader: str, index: int) -> ir.Value | None:
    """Take out the one-dimensional input of this name, or else the one that ``reader`` has at ``index``."""
    vectors = {key: value for key, value in named.items() if rank(value) == 1}
    if name in vectors:
        return named.pop(name)
    for key, value in vectors.items():
        if any(use.node.op_type == reader and use.idx == index for use in value.uses()):
            return named.pop(key)
    return None
