"""Comparing two sets of logits for the same tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """Log-softmax over the last axis in float64: [T, V] to [T, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) at each position in nats, from log probabilities [T, V]: float64 [T]."""
    result: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return result


def largest_difference(a: Logits, b: Logits) -> float:
    """Largest absolute difference; infinite when either has a value that is not finite."""
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")
