"""NumPy reference of chai::ClusteredHeadAttention: the meaning of the op, row by row.

Clear before fast: every other implementation (function body, torch, C++, Triton) is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chai_export.op import pages
from chai_export.op.attend import (
    Float,
    HeadTerms,
    Int32Array,
    Tensor,
    Visible,
    attend_row,
    probe_probabilities,
)
from chai_export.op.attributes import Attributes
from chai_export.op.head_map import cluster_heads, distances, kept_kv_heads, quantise
from chai_export.op.rows import Row, check_map, check_rows
from chai_export.op.storage import Storage


@dataclass(frozen=True)
class AttentionResult:
    """The outputs of the op; shapes and dtypes as in docs/op.md. Scales are None where there are none."""

    output: Tensor
    key_cache: Tensor
    value_cache: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    present_head_map: Int32Array


def clustered_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    page_table: Int32Array,
    past_head_map: Int32Array,
    past_lengths: Int32Array,
    lengths: Int32Array,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    attributes: Attributes,
    compute_dtype: Float = np.float32,
) -> AttentionResult:
    """Evaluate the op on copies of the caches.

    Args:
        query: T [B, H, S, D], after RoPE.
        key: T [B, G, S, D], new tokens, all KV heads, after RoPE.
        value: T [B, G, S, Dv], new tokens.
        key_cache: pool of pages [N, R, L, D], or [N, R, L, D/2] for 4 bits.
        value_cache: likewise [N, G, L, Dv] or [N, G, L, Dv/2].
        key_scales: float16 [N, R, L, D/group] or, for 4 bits, twice as wide; None for T and float16.
        value_scales: likewise [N, G, L, …].
        page_table: int32 [B, M], the page of positions j*L … j*L+L-1 of row b, or -1.
        past_head_map: int32 [B, H], query head to representative query head.
        past_lengths: int32 [B], tokens already in the cache (n).
        lengths: int32 [B], valid new tokens (m), 0 … S.
        sinks: T [H], a logit in each softmax's denominator, or None.
        alibi_slopes: float32 [H], or None.
        attributes: of the node.
        compute_dtype: arithmetic of scores and products. The head map is float32 whatever this is.

    Raises:
        ValueError: a row does not fit its pages, a length is out of range, a map or a table is invalid, or a
            page is written to that stands in the call twice. Nothing is written in that case.
    """
    attributes.check()
    group = query.shape[1] // key.shape[1]
    rows = check_rows(query, key_cache, page_table, past_head_map, past_lengths, lengths, attributes)
    terms = HeadTerms(sinks, alibi_slopes)
    storage_k = Storage(attributes.key_bits, key.shape[3], attributes.group)
    storage_v = Storage(attributes.value_bits, value.shape[3], attributes.group)
    maps = past_head_map.copy()
    for row in rows:
        if row.fresh:
            maps[row.index] = _clustered_map(row, query, key, key_cache.shape[1], attributes, terms)
        else:
            check_map(row.index, maps[row.index], group, key_cache.shape[1])

    result = AttentionResult(
        np.zeros((*query.shape[:1], query.shape[2], query.shape[1] * value.shape[3]), query.dtype),
        key_cache.copy(),
        value_cache.copy(),
        None if key_scales is None else key_scales.copy(),
        None if value_scales is None else value_scales.copy(),
        maps,
    )
    slots = {row.index: _slots(maps[row.index], group) for row in rows}
    for row in rows:
        table, new = page_table[row.index], row.new
        for kv, slot in slots[row.index].items():
            stored = storage_k.store(key[row.index, kv, :new])
            _append(result.key_cache, result.key_scales, table, row.past, stored, slot)
        stored = storage_v.store(value[row.index, :, :new])
        _append(result.value_cache, result.value_scales, table, row.past, stored, slice(None))
    for row in rows:
        table = page_table[row.index]
        positions = (row.seen.start, row.seen.stop)
        visible = Visible(
            row.seen.start,
            read_rows(storage_k, result.key_cache, result.key_scales, table, positions, compute_dtype),
            read_rows(storage_v, result.value_cache, result.value_scales, table, positions, compute_dtype),
        )
        result.output[row.index, : row.new] = attend_row(
            query[row.index, :, : row.new],
            key[row.index, :, : row.exact],
            value[row.index, :, : row.exact],
            row.past,
            visible,
            maps[row.index],
            slots[row.index],
            attributes,
            terms,
            compute_dtype,
        )
    return result


def read_rows(
    storage: Storage,
    pool: Tensor,
    scales: Tensor | None,
    table: Int32Array,
    positions: tuple[int, int],
    dtype: Any,
) -> Tensor:
    """The values of one row's positions: ``dtype`` [X, stop - start, width]."""
    stored = pages.read(pool, table, *positions)
    factors = None if scales is None else pages.read(scales, table, *positions)
    return storage.load(stored, factors, dtype)


def _clustered_map(
    row: Row, query: Tensor, key: Tensor, kept: int, attributes: Attributes, terms: HeadTerms
) -> Int32Array:
    probe = slice(0, row.exact)
    p = probe_probabilities(query[row.index, :, probe], key[row.index, :, probe], attributes, terms)
    return cluster_heads(distances(quantise(p)), key.shape[1], kept)


def _slots(head_map: Int32Array, group: int) -> dict[int, int]:
    return {kv: slot for slot, kv in enumerate(kept_kv_heads(head_map, group))}


def _append(
    pool: Tensor,
    scales: Tensor | None,
    table: Int32Array,
    start: int,
    stored: tuple[Tensor, Tensor | None],
    slot: int | slice,
) -> None:
    pages.write(pool, table, start, stored[0], slot)
    if scales is not None and stored[1] is not None:
        pages.write(scales, table, start, stored[1], slot)
