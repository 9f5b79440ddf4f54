"""Factors that bring the channels of keys to like sizes before they are stored in 4 bits.

A group of elements shares a scale and a minimum, so one large channel takes the precision of the others. Keys
are divided channel by channel and queries multiplied by the same numbers. These are the square roots of the
channels' peaks: they leave half of the difference to the group's own scale. What it gains, and what else was
tried: benchmarks/precision.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Equalisers = Mapping[int, NDArray[np.float32]]
"""By layer float32 [G, D]: what keys are divided by before they are stored; other layers keep theirs."""

_BITS = 4

_LEAST = 1e-3
"""Of the layer's largest peak: channels that calibration saw nothing in are not blown up."""


def equalisers(peaks: Sequence[Sequence[Sequence[float]]], key_bits: Sequence[int]) -> Equalisers:
    """Those of the layers whose keys are stored in 4 bits; none where ``peaks``, by layer, are not known."""
    return {layer: equaliser(peaks[layer]) for layer, bits in enumerate(key_bits) if peaks and bits == _BITS}


def equaliser(peaks: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """What the keys of one layer are divided by: float32 [G, D], positive, with a geometric mean of 1.

    Args:
        peaks: G lists of D numbers, the largest magnitude of each channel.
    """
    found = np.asarray(peaks, np.float64)
    largest = found.max()
    if largest == 0.0:
        return np.ones(found.shape, np.float32)
    exponents = np.log(np.maximum(found, _LEAST * largest)) / 2
    result: NDArray[np.float32] = np.exp(exponents - exponents.mean()).astype(np.float32)
    return result
