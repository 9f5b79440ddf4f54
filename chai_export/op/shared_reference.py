"""NumPy reference of chai::SharedClusteredHeadAttention, version 1: the meaning of the op, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chai_export.op.attend import Tensor, attend_row, check_map, check_rows, is_fresh, score_factor
from chai_export.op.head_map import (
    Int32Array,
    assign,
    distances,
    kept_kv_heads,
    probe_probabilities,
    quantise,
)
from chai_export.op.probe import PAPER_PROBE_TOKENS


@dataclass(frozen=True)
class SharedAttentionResult:
    """The two outputs of the op; shapes and dtypes as in :mod:`chai_export.op.schema`."""

    output: Tensor
    present_head_map: Int32Array


def shared_clustered_head_attention(
    query: Tensor,
    key: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kept_head_map: Int32Array,
    past_head_map: Int32Array,
    past_lengths: Int32Array,
    lengths: Int32Array,
    *,
    scale: float = 0.0,
    probe_tokens: int = PAPER_PROBE_TOKENS,
    online: bool = True,
    compute_dtype: type[np.floating[Any]] = np.float32,
) -> SharedAttentionResult:
    """Evaluate the op.

    Args:
        query: T [B, H, S, D], after RoPE.
        key: T [B, G, S, D], the producer's new keys; read in the probe of fresh rows only.
        key_cache: T [B, R, C, D], the producer's present_key.
        value_cache: T [B, G, C, Dv], the producer's present_value.
        kept_head_map: int32 [B, H], the producer's present_head_map.
        past_head_map: int32 [B, H], this layer's own map.
        past_lengths: int32 [B], tokens that were cached before the new ones (n).
        lengths: int32 [B], valid new tokens (m), 0 … S.
        scale: factor on the scores; 0 means 1/sqrt(D).
        probe_tokens: tokens whose probabilities decide the head map (P).
        online: assign heads in fresh rows; otherwise every row uses ``past_head_map``.
        compute_dtype: arithmetic of scores and products. The head map is float32 whatever this is.

    Raises:
        ValueError: a row does not fit its capacity, its length is out of range, a map is invalid, or a map
            names a KV head that the producer did not keep.
    """
    check_rows(query, key_cache, past_head_map, past_lengths, lengths, probe_tokens)
    factor = score_factor(scale, query.shape[3])
    batch, num_heads, tokens, _ = query.shape
    num_kv_heads = value_cache.shape[1]
    group = num_heads // num_kv_heads
    result = SharedAttentionResult(
        output=np.zeros((batch, tokens, num_heads * value_cache.shape[3]), dtype=query.dtype),
        present_head_map=past_head_map.copy(),
    )
    for b in range(batch):
        past, new = int(past_lengths[b]), int(lengths[b])
        if new == 0:
            continue
        check_map(b, kept_head_map[b], group, key_cache.shape[1])
        kept = kept_kv_heads(kept_head_map[b], group)
        fresh = is_fresh(past, new, online)
        exact = min(probe_tokens, new) if fresh else 0
        head_map = past_head_map[b]
        if fresh:
            p = probe_probabilities(query[b, :, :exact], key[b, :, :exact], factor)
            head_map = assign(distances(quantise(p)), num_kv_heads, kept)
        else:
            check_map(b, head_map, group, num_kv_heads)
            _check_kept(b, head_map, group, kept)
        result.present_head_map[b] = head_map
        result.output[b, :new] = attend_row(
            query[b, :, :new],
            key[b, :, :exact],
            key_cache[b, :, : past + new],
            value_cache[b, :, : past + new],
            head_map,
            {kv: slot for slot, kv in enumerate(kept)},
            scale=factor,
            compute_dtype=compute_dtype,
        )
    return result


def _check_kept(row: int, head_map: Int32Array, group: int, kept: list[int]) -> None:
    missing = sorted(set(kept_kv_heads(head_map, group)) - set(kept))
    if missing:
        raise ValueError(
            f"row {row}: the head map names KV head {missing[0]}, and the producer kept {kept} only"
        )
