"""Factors that bring the channels of keys to like sizes before they are stored in 4 bits.

A group of elements shares a scale and a minimum, so one large channel takes the precision of the others. Keys
are divided channel by channel and queries multiplied by the same numbers: scores stay what they are. The
square root divides the load between the two; it was best of what was tried on SmolLM2-135M
(benchmarks/precision.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LEAST = 1e-3
"""Of the layer's largest peak: channels that calibration saw nothing in are not blown up."""


def equaliser(peaks: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """What the keys of one layer are divided by: float32 [G, D], positive, with a geometric mean of 1.

    Args:
        peaks: G lists of D numbers, the largest magnitude of each channel.
    """
    found = np.asarray(peaks, np.float64)
    largest = found.max()
    if largest == 0.0:
        return np.ones(found.shape, np.float32)
    roots = np.sqrt(np.maximum(found, _LEAST * largest))
    result: NDArray[np.float32] = (roots / np.exp(np.log(roots).mean())).astype(np.float32)
    return result
