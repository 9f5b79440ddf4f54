"""What two sets of logits for the same tokens say about each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_ROWS = 128
"""Positions compared at a time: with a vocabulary of 128 k, 128 rows are 130 MB a copy in float64."""


def row_parts(count: int) -> Iterator[slice]:
    """``count`` positions in pieces whose copies in float64 stay small."""
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-softmax over the last axis in float64: [T, V] to [T, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) at each position in nats, from log probabilities [T, V]: float64 [T]."""
    result: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return result


def total_kl(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    """Sum over positions of KL(p || q) in nats, from logits [T, V]."""
    parts = (kl_divergence(log_probabilities(p[i]), log_probabilities(q[i])) for i in row_parts(len(p)))
    return max(0.0, sum(float(part.sum()) for part in parts))


def differences(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest absolute difference at each position, [T, V] to [T]; infinite where a value is not finite."""
    found = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(axis=-1)
    result: NDArray[np.float64] = np.where(np.isfinite(found), found, np.inf)
    return result
