"""The head map: which query heads share scores, decided from a sequence's first tokens.

This is step 1 of the op (paper section 3.3, with k-medoids in integers instead of K-Means).
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


def quantise(probabilities: Float32Array) -> Int32Array:
    """``rint(1024 * p)``, half to even: float32 [..., t, t] to int32 of the same shape."""
    quantised: Int32Array = np.rint(probabilities * np.float32(QUANTISATION_STEPS)).astype(np.int32)
    return quantised


def distances(quantised: Int32Array) -> Int64Array:
    """Sum of absolute differences between each pair of heads: int32 [H, t, t] to int64 [H, H].

    Row by row it is twice the total variation of two heads' probabilities, in quantisation steps.
    """
    flat = quantised.reshape(quantised.shape[0], -1).astype(np.int64)
    # One head at a time: [H, H, t*t] at once would be large for a long probe.
    return np.stack([np.abs(flat - head).sum(axis=1) for head in flat])


def squared_distances(quantised: Int32Array) -> Int64Array:
    """Squared Euclidean distance between each pair of heads: int32 [H, t, t] to int64 [H, H].

    The paper's clustering error adds these up; the error curves of the offline phase do too.
    """
    flat = quantised.reshape(quantised.shape[0], -1).astype(np.int64)
    norms = np.einsum("hf,hf->h", flat, flat)
    result: Int64Array = norms[:, None] + norms[None, :] - 2 * (flat @ flat.T)
    return result


def greedy_order(distance: Int64Array, num_kv_heads: int, kept: int) -> tuple[list[int], list[int]]:
    """Choose KV heads one by one, each time the one that lowers the clustering error most.

    Args:
        distance: int64 [H, H].
        num_kv_heads: G; query heads r with ``r // (H // G) == g`` belong to KV head g.
        kept: how many KV heads to choose, 1 … G.

    Returns:
        The chosen KV heads in order of choice, and after each choice the clustering error: the sum over
        query heads of the distance to the nearest query head of a chosen KV head.
    """
    to_kv = _to_kv_heads(distance, num_kv_heads, kept)
    chosen: list[int] = []
    errors: list[int] = []
    for _ in range(kept):
        chosen.append(_best_addition(to_kv, chosen))
        errors.append(int(to_kv[:, chosen].min(axis=1).sum()))
    return chosen, errors


def choose_kv_heads(distance: Int64Array, num_kv_heads: int, kept: int) -> list[int]:
    """The kept KV heads of the op: a greedy choice, then every choice made once more.

    ``2 * kept`` steps. Each adds the KV head that lowers the clustering error most, the lower index on a
    tie; from step ``kept`` on, the head added ``kept`` steps earlier is dropped first. It may come back, so
    the error never rises.

    Args:
        distance: int64 [H, H], see :func:`distances`.
        num_kv_heads: G.
        kept: R, 1 … G.

    Returns:
        R KV heads, the one chosen longest ago first.
    """
    to_kv = _to_kv_heads(distance, num_kv_heads, kept)
    chosen: list[int] = []
    for _ in range(2 * kept):
        chosen = chosen[max(0, len(chosen) - kept + 1) :]
        chosen.append(_best_addition(to_kv, chosen))
    return chosen


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


def cluster_heads(distance: Int64Array, num_kv_heads: int, kept: int) -> Int32Array:
    """Head map of one row, int32 [H]: choose ``kept`` KV heads, then the nearest representative."""
    return assign(distance, num_kv_heads, choose_kv_heads(distance, num_kv_heads, kept))


def kept_kv_heads(head_map: Int32Array, group: int) -> list[int]:
    """The KV heads that a map keeps, ascending; their position in the list is their K-cache slot."""
    return sorted({int(representative) // group for representative in head_map})


def _to_kv_heads(distance: Int64Array, num_kv_heads: int, kept: int) -> Int64Array:
    """Distance of each query head to the nearest query head of each KV head: int64 [H, G]."""
    if not 1 <= kept <= num_kv_heads:
        raise ValueError(f"kept must be between 1 and {num_kv_heads}, got {kept}")
    to_kv: Int64Array = distance.reshape(distance.shape[0], num_kv_heads, -1).min(axis=2)
    return to_kv


def _best_addition(to_kv: Int64Array, chosen: list[int]) -> int:
    """The KV head that is best added to ``chosen``."""
    nearest = to_kv[:, chosen].min(axis=1, initial=UNASSIGNED_DISTANCE)
    cost = np.minimum(nearest[:, None], to_kv).sum(axis=0)
    cost[chosen] = np.iinfo(np.int64).max
    return int(cost.argmin())
