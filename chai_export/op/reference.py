"""NumPy reference of chai::ClusteredHeadAttention, version 1: the meaning of the op, row by row.

Clear before fast: every other implementation (function body, torch, C++, Triton) is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chai_export.op.attend import Tensor, attend_row, check_map, check_rows, is_fresh, score_factor
from chai_export.op.head_map import (
    Int32Array,
    cluster_heads,
    distances,
    kept_kv_heads,
    probe_probabilities,
    quantise,
)
from chai_export.op.probe import PAPER_PROBE_TOKENS


@dataclass(frozen=True)
class AttentionResult:
    """The four outputs of the op; shapes and dtypes as in :mod:`chai_export.op.schema`."""

    output: Tensor
    present_key: Tensor
    present_value: Tensor
    present_head_map: Int32Array


def clustered_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_head_map: Int32Array,
    past_lengths: Int32Array,
    lengths: Int32Array,
    *,
    scale: float = 0.0,
    probe_tokens: int = PAPER_PROBE_TOKENS,
    online: bool = True,
    compute_dtype: type[np.floating[Any]] = np.float32,
) -> AttentionResult:
    """Evaluate the op on copies of the caches.

    Args:
        query: T [B, H, S, D], after RoPE.
        key: T [B, G, S, D], new tokens, all KV heads, after RoPE.
        value: T [B, G, S, Dv], new tokens.
        past_key: T [B, R, C, D], compact K cache.
        past_value: T [B, G, C, Dv], full V cache.
        past_head_map: int32 [B, H], query head to representative query head.
        past_lengths: int32 [B], tokens already in the cache (n).
        lengths: int32 [B], valid new tokens (m), 0 … S.
        scale: factor on the scores; 0 means 1/sqrt(D).
        probe_tokens: tokens whose probabilities decide the head map (P).
        online: cluster fresh rows; otherwise every row uses ``past_head_map``.
        compute_dtype: arithmetic of scores and products. The head map is float32 whatever this is.

    Raises:
        ValueError: a row does not fit its capacity, its length is out of range, or its map is invalid.
            Nothing is written in that case.
    """
    check_rows(query, past_key, past_head_map, past_lengths, lengths, probe_tokens)
    factor = score_factor(scale, query.shape[3])
    batch, num_heads, tokens, _ = query.shape
    group = num_heads // key.shape[1]
    result = AttentionResult(
        output=np.zeros((batch, tokens, num_heads * value.shape[3]), dtype=query.dtype),
        present_key=past_key.copy(),
        present_value=past_value.copy(),
        present_head_map=past_head_map.copy(),
    )
    maps: list[Int32Array] = []
    for b in range(batch):
        fresh = is_fresh(int(past_lengths[b]), int(lengths[b]), online)
        head_map = past_head_map[b]
        if fresh:
            probe = min(probe_tokens, int(lengths[b]))
            p = probe_probabilities(query[b, :, :probe], key[b, :, :probe], factor)
            head_map = cluster_heads(distances(quantise(p)), key.shape[1], past_key.shape[1])
        elif lengths[b] > 0:
            check_map(b, head_map, group, past_key.shape[1])
        maps.append(head_map)
    for b in range(batch):
        past, new = int(past_lengths[b]), int(lengths[b])
        if new == 0:
            continue
        head_map = maps[b]
        result.present_head_map[b] = head_map
        slots = {kv: slot for slot, kv in enumerate(kept_kv_heads(head_map, group))}
        for kv, slot in slots.items():
            result.present_key[b, slot, past : past + new] = key[b, kv, :new]
        result.present_value[b, :, past : past + new] = value[b, :, :new]

        exact = min(probe_tokens, new) if is_fresh(past, new, online) else 0
        result.output[b, :new] = attend_row(
            query[b, :, :new],
            key[b, :, :exact],
            result.present_key[b, :, : past + new],
            result.present_value[b, :, : past + new],
            head_map,
            slots,
            scale=factor,
            compute_dtype=compute_dtype,
        )
    return result
