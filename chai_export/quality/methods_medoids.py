"""Head maps by k-medoids in integers: the op's rule and its relatives.

All of them keep whole KV heads, so for grouped-query models the K cache shrinks there too, and all decide
ties by the lower index, so that the same probabilities give the same map everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from chai_export.op.head_map import assign, distances, greedy_order, quantise, squared_distances

Probabilities = NDArray[np.float32]
HeadMap = NDArray[np.int32]
Distance = NDArray[np.int64]
Measure = Callable[[Probabilities], Distance]
"""Probe probabilities float32 [H, t, t] to the distance of each pair of query heads, int64 [H, H]."""

_COSINE_STEPS = 1 << 20
_FAR = 1 << 40
_OUT_OF_REACH = 1 << 62


def squared_distance(probabilities: Probabilities) -> Distance:
    """Sum of squared differences of the quantised probabilities: the objective of the paper's K-Means."""
    return squared_distances(quantise(probabilities))


def absolute_distance(probabilities: Probabilities) -> Distance:
    """Sum of absolute differences of the quantised probabilities: twice the total variation, row by row.

    It bounds how far the attended values can move apart, and a few rows that differ much weigh less than
    with squares.
    """
    return distances(quantise(probabilities))


def cosine_distance(probabilities: Probabilities) -> Distance:
    """One minus the cosine of the flattened probabilities, in steps of 2^-20."""
    flat = quantise(probabilities).reshape(len(probabilities), -1).astype(np.float64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    steps = np.rint((1.0 - flat @ flat.T) * _COSINE_STEPS).astype(np.int64)
    result: Distance = np.maximum(steps, 0)
    return result


def greedy_map(distance: Distance, num_kv_heads: int, kept: int) -> HeadMap:
    """Greedy choice, each KV head once: each choice final, as for the error curves."""
    return assign(distance, num_kv_heads, greedy_order(distance, num_kv_heads, kept)[0])


def refined_order(distance: Distance, num_kv_heads: int, kept: int, passes: int) -> list[int]:
    """Greedy choice, then ``passes`` times every choice again: the oldest is dropped and the best put in.

    Each step is the greedy step on what is left after the drop, so the error never rises, and a dropped
    head may return. Work: (1 + passes)·R steps of H·G comparisons, all in integers.

    Args:
        distance: int64 [H, H].
        num_kv_heads: G.
        kept: R, 1 … G.
        passes: rounds of re-choosing; 0 is the greedy choice.

    Returns:
        The kept KV heads, the one chosen longest ago first.
    """
    heads = len(distance)
    to_group = distance.reshape(heads, num_kv_heads, -1).min(axis=2)
    chosen: list[int] = []
    for _ in range(kept * (1 + passes)):
        chosen = chosen[-(kept - 1) :] if kept > 1 else []
        nearest = to_group[:, chosen].min(axis=1) if chosen else np.full(heads, _FAR, dtype=np.int64)
        cost = np.minimum(nearest[:, None], to_group).sum(axis=0)
        cost[chosen] = _OUT_OF_REACH
        chosen.append(int(cost.argmin()))
    return chosen


def refined_map(distance: Distance, num_kv_heads: int, kept: int, passes: int = 1) -> HeadMap:
    """Head map of :func:`refined_order`."""
    return assign(distance, num_kv_heads, refined_order(distance, num_kv_heads, kept, passes))


def voronoi_map(distance: Distance, num_kv_heads: int, kept: int, rounds: int = 8) -> HeadMap:
    """Greedy choice, then Voronoi iteration: assign every KV head, move each cluster's medoid, repeat.

    The medoid moves only within its cluster (Park and Jun 2009, "A simple and fast algorithm for K-medoids
    clustering"), so it is cheaper than re-choosing among all heads and gets stuck earlier.
    """
    heads = len(distance)
    group = heads // num_kv_heads
    between = distance.reshape(num_kv_heads, group, num_kv_heads, group).min(axis=3).sum(axis=1)
    medoids = sorted(greedy_order(distance, num_kv_heads, kept)[0])
    for _ in range(rounds):
        nearest = between[:, medoids].argmin(axis=1)
        nearest[medoids] = np.arange(kept)
        moved = []
        for cluster in range(kept):
            members = np.flatnonzero(nearest == cluster)
            moved.append(int(members[between[np.ix_(members, members)].sum(axis=0).argmin()]))
        if sorted(moved) == medoids:
            break
        medoids = sorted(moved)
    return assign(distance, num_kv_heads, medoids)
