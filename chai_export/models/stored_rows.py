"""Rows of keys and values as attention reads them back from a cache of fewer bits, in torch.

The rule is that of docs/op.md, "How a row is stored", written here once more for the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chai_export.op.storage import Storage

_LARGEST = {8: 127.0, 4: 15.0}
_HALF_BITS, _HALF_LEAST = 10, -14
"""Bits of a float16's fraction, and the exponent of its smallest normal number."""


@dataclass(frozen=True)
class StoredRounding:
    """Rounding to nearest, but the other way for numbers that lie closer than ``ties`` to the middle of two.

    ``ties`` is in steps from one number that can be stored to the next; 0 is the op's rule. Two computations
    that are both right store other numbers there.
    """

    ties: float = 0.0

    def codes(self, ratio: Tensor) -> Tensor:
        """float32 integers."""
        nearest = torch.round(ratio)
        return torch.round(ratio + self.ties * (ratio - nearest).sign()) if self.ties else nearest

    def half(self, values: Tensor) -> Tensor:
        """float32 numbers that float16 has."""
        nearest = values.half().float()
        if not self.ties:
            return nearest
        exponent = torch.frexp(values).exponent - 1
        step = torch.ldexp(torch.ones_like(values), exponent.clamp_min(_HALF_LEAST) - _HALF_BITS)
        return (values + self.ties * step * (values - nearest).sign()).half().float()


def read_back(rows: Tensor, storage: Storage, rounding: StoredRounding) -> Tensor:
    """What is read of ``rows`` [..., width] once they are stored; ``rows`` themselves where nothing is lost.

    Returns:
        float32 [..., width].
    """
    if storage.bits == 0:
        return rows
    if storage.bits == 16:
        return rounding.half(rows.float())
    grouped = rows.float().reshape(*rows.shape[:-1], -1, storage.group)
    largest = _LARGEST[storage.bits]
    if storage.bits == 8:
        least, low = -largest, torch.zeros_like(grouped[..., :1])
        scale = rounding.half(grouped.abs().amax(-1, keepdim=True) / largest)
    else:
        least, low = 0.0, rounding.half(grouped.amin(-1, keepdim=True))
        scale = rounding.half((grouped.amax(-1, keepdim=True) - low) / largest)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = rounding.codes((grouped - low) / divisor).clamp(least, largest)
    codes = torch.where(scale == 0, torch.zeros_like(codes), codes)
    return (codes * scale + low).flatten(-2)
