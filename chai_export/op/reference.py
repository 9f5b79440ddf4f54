"""NumPy reference of chai::ClusteredHeadAttention, version 1: the meaning of the op, row by row.

Clear before fast: every other implementation (function body, torch, C++, Triton) is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.op.head_map import (
    Int32Array,
    cluster_heads,
    distances,
    kept_kv_heads,
    probe_probabilities,
    quantise,
)

Tensor = NDArray[Any]


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
    probe_tokens: int = 5,
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
    _check_rows(query, past_key, past_head_map, past_lengths, lengths, probe_tokens)
    factor = scale if scale != 0.0 else 1.0 / float(np.sqrt(query.shape[3]))
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
        fresh = _is_fresh(int(past_lengths[b]), int(lengths[b]), online)
        head_map = past_head_map[b]
        if fresh:
            probe = min(probe_tokens, int(lengths[b]))
            p = probe_probabilities(query[b, :, :probe], key[b, :, :probe], factor)
            head_map = cluster_heads(distances(quantise(p)), key.shape[1], past_key.shape[1])
        elif lengths[b] > 0:
            _check_map(b, head_map, num_heads, group, past_key.shape[1])
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

        exact = min(probe_tokens, new) if _is_fresh(past, new, online) else 0
        for h in range(num_heads):
            representative = int(head_map[h])
            values = result.present_value[b, h // group, : past + new].astype(compute_dtype)
            scores = np.empty((new, past + new), dtype=compute_dtype)
            slot_keys = result.present_key[b, slots[representative // group], : past + new]
            scores[exact:] = _scores(query[b, representative, exact:new], slot_keys, compute_dtype)
            if exact:
                scores[:exact] = _scores(query[b, h, :exact], key[b, h // group, :new], compute_dtype)
            attended = _causal_softmax(scores * compute_dtype(factor), past) @ values
            columns = slice(h * value.shape[3], (h + 1) * value.shape[3])
            result.output[b, :new, columns] = attended.astype(query.dtype)
    return result


def _is_fresh(past: int, new: int, online: bool) -> bool:
    return online and past == 0 and new > 0


def _scores(query: Tensor, keys: Tensor, dtype: type[np.floating[Any]]) -> Tensor:
    product: Tensor = query.astype(dtype) @ keys.astype(dtype).T
    return product


def _causal_softmax(scores: Tensor, past: int) -> Tensor:
    """Softmax over the last axis; token i sees positions 0 … past + i."""
    visible = np.tri(scores.shape[0], scores.shape[1], k=past, dtype=bool)
    masked = np.where(visible, scores, -np.inf)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))
    probabilities: Tensor = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def _check_rows(
    query: Tensor,
    past_key: Tensor,
    past_head_map: Int32Array,
    past_lengths: Int32Array,
    lengths: Int32Array,
    probe_tokens: int,
) -> None:
    batch, num_heads, tokens, _ = query.shape
    capacity = past_key.shape[2]
    if probe_tokens < 1:
        raise ValueError(f"probe_tokens must be at least 1, got {probe_tokens}")
    if past_head_map.shape != (batch, num_heads):
        raise ValueError(f"past_head_map must be [{batch}, {num_heads}], got {list(past_head_map.shape)}")
    for b in range(batch):
        past, new = int(past_lengths[b]), int(lengths[b])
        if not 0 <= new <= tokens:
            raise ValueError(f"row {b}: lengths is {new}, must be between 0 and {tokens}")
        if past < 0:
            raise ValueError(f"row {b}: past_lengths is {past}, must not be negative")
        if new > 0 and past + new > capacity:
            raise ValueError(f"row {b}: {past} cached and {new} new tokens exceed the capacity {capacity}")


def _check_map(row: int, head_map: Int32Array, num_heads: int, group: int, kept: int) -> None:
    if head_map.min() < 0 or head_map.max() >= num_heads:
        raise ValueError(f"row {row}: head map entries must be between 0 and {num_heads - 1}")
    distinct = len(kept_kv_heads(head_map, group))
    if distinct > kept:
        raise ValueError(f"row {row}: the head map keeps {distinct} KV heads, the K cache has {kept} slots")
