"""Comparing what an implementation of the op gives with what the reference gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[Any]

RELATIVE_TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest |difference| to the float64 reference, as a share of the largest |reference| of the case."""

LEAST_OUTPUT = 0.02
"""Outputs smaller than this are allowed the differences of this one: values are drawn with a deviation of 1,
so that they nearly cancel out there, and what is left of them has their rounding errors."""


def check_output(name: str, output: Tensor, exact: Tensor, lengths: Tensor, dtype: str) -> None:
    """Compare attended values [B,S,H*Dv] with the float64 ``exact`` ones; padded tokens must be zero.

    Raises:
        AssertionError: naming the case and the worst difference.
    """
    wanted = exact.astype(np.float64)
    actual = np.asarray(output).astype(np.float64)
    assert actual.shape == wanted.shape, f"{name}: output is {actual.shape}, expected {wanted.shape}"
    worst = np.abs(actual - wanted).max(initial=0.0)
    limit = RELATIVE_TOLERANCE[dtype] * max(np.abs(wanted).max(initial=0.0), LEAST_OUTPUT)
    assert worst <= limit, f"{name}: output differs by {worst:.3g}, allowed {limit:.3g}"
    padded = np.arange(actual.shape[1])[None, :] >= lengths[:, None]
    assert not actual[padded].any(), f"{name}: output is not zero in padded tokens"


def widen(tensor: Tensor) -> Tensor:
    """Float tensors as float64 (the head map still computes in float32 from the same values)."""
    return tensor if np.issubdtype(tensor.dtype, np.integer) else tensor.astype(np.float64)


def check_bits(what: str, actual: Tensor, wanted: Tensor) -> None:
    """Compare byte by byte, so that NaN equals itself.

    Raises:
        AssertionError: beginning with ``what``.
    """
    assert actual.dtype == wanted.dtype, f"{what} is {actual.dtype}, expected {wanted.dtype}"
    assert actual.shape == wanted.shape, f"{what} is {actual.shape}, expected {wanted.shape}"
    unsigned = np.dtype(f"u{wanted.dtype.itemsize}")
    different = np.ascontiguousarray(actual).view(unsigned) != np.ascontiguousarray(wanted).view(unsigned)
    assert not different.any(), (
        f"{what} differs in {int(different.sum())} elements, first at {np.argwhere(different)[0].tolist()}"
    )
