"""NumPy reference of chai::SharedClusteredHeadAttention: a layer on another layer's caches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
from chai_export.op.head_map import assign, distances, kept_kv_heads, quantise
from chai_export.op.reference import read_rows
from chai_export.op.rows import check_map, check_rows
from chai_export.op.storage import Storage


@dataclass(frozen=True)
class SharedAttentionResult:
    """The two outputs of the op; shapes and dtypes as in docs/op.md."""

    output: Tensor
    present_head_map: Int32Array


def shared_clustered_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    page_table: Int32Array,
    kept_head_map: Int32Array,
    past_head_map: Int32Array,
    past_lengths: Int32Array,
    lengths: Int32Array,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    attributes: Attributes,
    compute_dtype: Float = np.float32,
) -> SharedAttentionResult:
    """Evaluate the op.

    Args:
        query: T [B, H, S, D], after RoPE.
        key: T [B, G, S, D], the producer's new keys; read in the probe of fresh rows only.
        value: T [B, G, S, Dv], likewise.
        key_cache: the producer's present_key_cache.
        value_cache: the producer's present_value_cache.
        key_scales: the producer's present_key_scales, or None.
        value_scales: the producer's present_value_scales, or None.
        page_table: int32 [B, M], the producer's.
        kept_head_map: int32 [B, H], the producer's present_head_map.
        past_head_map: int32 [B, H], this layer's own map.
        past_lengths: int32 [B], tokens that were cached before the new ones (n).
        lengths: int32 [B], valid new tokens (m), 0 … S.
        sinks: T [H], or None.
        alibi_slopes: float32 [H], or None.
        attributes: of the node.
        compute_dtype: arithmetic of scores and products. The head map is float32 whatever this is.

    Raises:
        ValueError: a row does not fit its pages, a length is out of range, a map or a table is invalid, or a
            map names a KV head that the producer did not keep.
    """
    attributes.check()
    rows = check_rows(query, key_cache, page_table, past_head_map, past_lengths, lengths, attributes)
    num_heads, num_kv_heads = query.shape[1], value_cache.shape[1]
    group = num_heads // num_kv_heads
    terms = HeadTerms(sinks, alibi_slopes)
    storage_k = Storage(attributes.key_bits, query.shape[3], attributes.group)
    storage_v = Storage(attributes.value_bits, value.shape[3], attributes.group)
    result = SharedAttentionResult(
        np.zeros((query.shape[0], query.shape[2], num_heads * value.shape[3]), query.dtype),
        past_head_map.copy(),
    )
    for row in rows:
        b, table = row.index, page_table[row.index]
        check_map(b, kept_head_map[b], group, key_cache.shape[1])
        kept = kept_kv_heads(kept_head_map[b], group)
        if row.fresh:
            probe = slice(0, row.exact)
            p = probe_probabilities(query[b, :, probe], key[b, :, probe], attributes, terms)
            result.present_head_map[b] = assign(distances(quantise(p)), num_kv_heads, kept)
        else:
            check_map(b, past_head_map[b], group, num_kv_heads)
            _check_kept(b, past_head_map[b], group, kept)
        positions = (row.seen.start, row.seen.stop)
        result.output[b, : row.new] = attend_row(
            query[b, :, : row.new],
            key[b, :, : row.exact],
            value[b, :, : row.exact],
            row.past,
            Visible(
                row.seen.start,
                read_rows(storage_k, key_cache, key_scales, table, positions, compute_dtype),
                read_rows(storage_v, value_cache, value_scales, table, positions, compute_dtype),
            ),
            result.present_head_map[b],
            {kv: slot for slot, kv in enumerate(kept)},
            attributes,
            terms,
            compute_dtype,
        )
    return result


def _check_kept(row: int, head_map: Int32Array, group: int, kept: list[int]) -> None:
    missing = sorted(set(kept_kv_heads(head_map, group)) - set(kept))
    if missing:
        raise ValueError(
            f"row {row}: the head map names KV head {missing[0]}, and the producer kept {kept} only"
        )
