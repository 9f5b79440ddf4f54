"""The head map: which query heads share scores, decided from a sequence's first tokens.

This is step 1 of the op (paper section 3.3, with greedy k-medoids in integers instead of K-Means).
Everything after the quantisation is integer arithmetic: mutually nearest heads tie exactly, so floats
would decide ties differently in each implementation. NumPy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

QUANTISATION_STEPS = 1024
"""A probability p becomes ``rint(1024 * p)``, half to even."""

UNASSIGNED_DISTANCE = 1 << 40
"""Distance of every head to the empty set of kept heads; larger than any real distance."""

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]


def probe_probabilities(query: NDArray[np.generic], key: NDArray[np.generic], scale: float) -> Float32Array:
    """Causal attention probabilities of the probe tokens of one row, float32.

    Args:
        query: [H, t, D], any float dtype, after RoPE.
        key: [G, t, D], H a multiple of G.
        scale: factor on the scores.

    Returns:
        float32 [H, t, t]; row i holds the probabilities over keys 0 … i and zeros above the diagonal.
    """
    group = query.shape[0] // key.shape[0]
    keys = np.repeat(key.astype(np.float32), group, axis=0)
    scores = np.matmul(query.astype(np.float32), keys.transpose(0, 2, 1)) * np.float32(scale)
    tokens = query.shape[1]
    causal = np.tri(tokens, dtype=bool)
    scores = np.where(causal, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: Float32Array = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def quantise(probabilities: Float32Array) -> Int32Array:
    """``rint(1024 * p)``, half to even: float32 [..., t, t] to int32 of the same shape."""
    quantised: Int32Array = np.rint(probabilities * np.float32(QUANTISATION_STEPS)).astype(np.int32)
    return quantised


def distances(quantised: Int32Array) -> Int64Array:
    """Squared Euclidean distance between each pair of heads: int32 [H, t, t] to int64 [H, H]."""
    flat = quantised.reshape(quantised.shape[0], -1).astype(np.int64)
    norms = np.einsum("hf,hf->h", flat, flat)
    result: Int64Array = norms[:, None] + norms[None, :] - 2 * (flat @ flat.T)
    return result


def greedy_order(distance: Int64Array, num_kv_heads: int, kept: int) -> tuple[list[int], list[int]]:
    """Choose KV heads one by one, each time the one that lowers the clustering error most.

    Args:
        distance: int64 [H, H], see :func:`distances`.
        num_kv_heads: G; query heads r with ``r // (H // G) == g`` belong to KV head g.
        kept: how many KV heads to choose, 1 … G.

    Returns:
        The chosen KV heads in order of choice, and after each choice the clustering error: the sum over
        query heads of the distance to the nearest query head of a chosen KV head.
    """
    num_heads = distance.shape[0]
    if not 1 <= kept <= num_kv_heads:
        raise ValueError(f"kept must be between 1 and {num_kv_heads}, got {kept}")
    to_group = distance.reshape(num_heads, num_kv_heads, -1).min(axis=2)
    nearest = np.full(num_heads, UNASSIGNED_DISTANCE, dtype=np.int64)
    chosen: list[int] = []
    errors: list[int] = []
    for _ in range(kept):
        cost = np.minimum(nearest[:, None], to_group).sum(axis=0)
        cost[chosen] = np.iinfo(np.int64).max
        best = int(cost.argmin())
        chosen.append(best)
        nearest = np.minimum(nearest, to_group[:, best])
        errors.append(int(nearest.sum()))
    return chosen, errors


def assign(distance: Int64Array, num_kv_heads: int, kept_kv: list[int]) -> Int32Array:
    """Map each query head to its representative, given the kept KV heads: int32 [H].

    A query head whose KV head is kept represents itself; any other maps to the nearest query head of a
    kept KV head, the lower index on a tie.
    """
    num_heads = distance.shape[0]
    group = num_heads // num_kv_heads
    candidate = np.isin(np.arange(num_heads) // group, kept_kv)
    reachable = np.where(candidate[None, :], distance, np.iinfo(np.int64).max)
    head_map: Int32Array = reachable.argmin(axis=1).astype(np.int32)
    head_map[candidate] = np.flatnonzero(candidate)
    return head_map


def greedy_head_map(distance: Int64Array, num_kv_heads: int, kept: int) -> Int32Array:
    """Head map of one row, int32 [H]: greedy choice of ``kept`` KV heads, then nearest representative."""
    chosen, _ = greedy_order(distance, num_kv_heads, kept)
    return assign(distance, num_kv_heads, chosen)


def kept_kv_heads(head_map: Int32Array, group: int) -> list[int]:
    """The KV heads that a map keeps, ascending; their position in the list is their K-cache slot."""
    return sorted({int(representative) // group for representative in head_map})
