"""What the NumPy references of both ops share: attention of one row by a head map, and the checks of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.op.head_map import Int32Array, kept_kv_heads

Tensor = NDArray[Any]


def is_fresh(past: int, new: int, online: bool) -> bool:
    """Whether a row decides its head map in this call."""
    return online and past == 0 and new > 0


def score_factor(scale: float, head_dim: int) -> float:
    """The factor on the scores: ``scale``, or 1/sqrt(D) where it is 0."""
    return scale if scale != 0.0 else 1.0 / float(np.sqrt(head_dim))


def attend_row(
    query: Tensor,
    probe_key: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    head_map: Int32Array,
    slots: Mapping[int, int],
    *,
    scale: float,
    compute_dtype: type[np.floating[Any]],
) -> Tensor:
    """Step 4 of the ops for one active row, its new tokens being in the caches already.

    Args:
        query: T [H, m, D], valid new tokens.
        probe_key: T [G, e, D], keys of the first e tokens, which are exact; e is 0 unless the row is fresh.
        key_cache: T [R, n+m, D].
        value_cache: T [G, n+m, Dv].
        head_map: int32 [H].
        slots: KV head to slot of the K cache.
        scale: factor on the scores.
        compute_dtype: arithmetic of scores and products.

    Returns:
        T [m, H*Dv].
    """
    num_heads, new, _ = query.shape
    group = num_heads // value_cache.shape[0]
    exact, past = probe_key.shape[1], value_cache.shape[1] - new
    width = value_cache.shape[2]
    output = np.empty((new, num_heads * width), dtype=query.dtype)
    for h in range(num_heads):
        representative = int(head_map[h])
        slot_keys = key_cache[slots[representative // group]]
        scores = np.full((new, past + new), -np.inf, dtype=compute_dtype)
        scores[exact:] = _scores(query[representative, exact:], slot_keys, compute_dtype)
        scores[:exact, :exact] = _scores(query[h, :exact], probe_key[h // group], compute_dtype)
        values = value_cache[h // group].astype(compute_dtype)
        attended = _causal_softmax(scores * compute_dtype(scale), past) @ values
        output[:, h * width : (h + 1) * width] = attended.astype(query.dtype)
    return output


def check_rows(
    query: Tensor,
    key_cache: Tensor,
    past_head_map: Int32Array,
    past_lengths: Int32Array,
    lengths: Int32Array,
    probe_tokens: int,
) -> None:
    """Raise ValueError unless lengths, capacity and shapes of maps fit each other."""
    batch, num_heads, tokens, _ = query.shape
    capacity = key_cache.shape[2]
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


def check_map(row: int, head_map: Int32Array, group: int, kept: int) -> None:
    """Raise ValueError unless a map names existing heads, of at most ``kept`` KV heads."""
    num_heads = len(head_map)
    if head_map.min() < 0 or head_map.max() >= num_heads:
        raise ValueError(f"row {row}: head map entries must be between 0 and {num_heads - 1}")
    distinct = len(kept_kv_heads(head_map, group))
    if distinct > kept:
        raise ValueError(f"row {row}: the head map keeps {distinct} KV heads, the K cache has {kept} slots")


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
