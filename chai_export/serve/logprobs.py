"""Log-probabilities of tokens under the model's own distribution, before sampling settings change it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Score:
    """Log-probability of a token, and the likeliest tokens at its place with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def score(logits: NDArray[np.float32], token: int, top: int) -> Score:
    """Score ``token`` and the ``top`` likeliest from logits [V]."""
    scores = logits.astype(np.float64)
    most = scores.max()
    scores -= most + np.log(np.exp(scores - most).sum())
    best = _largest(scores, top)
    return Score(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in best))


def _largest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the largest, descending; of equals the lower first, as argmax has it."""
    count = min(count, len(scores))
    if not count:
        return np.empty(0, np.int64)
    least = np.partition(scores, -count)[-count]
    found = np.flatnonzero(scores >= least)
    order: NDArray[np.int64] = found[np.argsort(-scores[found], kind="stable")]
    return order[:count]
