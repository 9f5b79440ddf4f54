"""How rows of keys and values are stored: in T, in float16, in 8 bits or in 4 bits per element.

A row is one token of one head. 8 bits are symmetric, with one scale per group of elements; 4 bits have a
scale and a minimum. All arithmetic is float32 with IEEE division, so that every implementation stores the
same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[Any]

BITS = (0, 16, 8, 4)
"""0 is storage in T, whatever T is."""

SCALES_PER_GROUP = {8: 1, 4: 2}
"""float16 numbers per group of elements, for bits that have codes."""

_STORED: dict[int, np.dtype[Any]] = {16: np.dtype("f2"), 8: np.dtype("i1"), 4: np.dtype("u1")}
_LARGEST_8 = 127
_LARGEST_4 = 15


@dataclass(frozen=True)
class Storage:
    """The storage of rows of ``width`` elements."""

    bits: int
    width: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.quantised and (self.group < 1 or self.width % self.group):
            raise ValueError(f"group must divide the head dim {self.width}, got {self.group}")
        if self.bits == 4 and self.group % 2:
            raise ValueError(f"4 bits need an even group, got {self.group}")

    @property
    def quantised(self) -> bool:
        """Whether rows are codes with scales."""
        return self.bits in SCALES_PER_GROUP

    @property
    def columns(self) -> int:
        """Elements of the cache tensor per row: two codes of 4 bits share a byte."""
        return self.width // 2 if self.bits == 4 else self.width

    @property
    def scale_columns(self) -> int:
        """float16 numbers per row beside the codes: scales, then (4 bits) minima; 0 where there are none."""
        return self.width // self.group * SCALES_PER_GROUP[self.bits] if self.quantised else 0

    def row_bytes(self, item_size: int) -> int:
        """Bytes of one row with its scales; ``item_size`` is that of T."""
        return self.element_bytes(item_size) + self.scale_bytes

    def element_bytes(self, item_size: int) -> int:
        """Bytes of one row without its scales."""
        return self.columns * {0: item_size, 16: 2, 8: 1, 4: 1}[self.bits]

    @property
    def scale_bytes(self) -> int:
        """Bytes of one row's scales and minima."""
        return 2 * self.scale_columns

    def dtype(self, element: np.dtype[Any]) -> np.dtype[Any]:
        """dtype of the cache tensor; ``element`` is T."""
        return element if self.bits == 0 else _STORED[self.bits]

    def store(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the cache holds of T [..., width]: elements [..., columns], scales [..., scale_columns]."""
        if not self.quantised:
            return rows.astype(self.dtype(rows.dtype)), None
        grouped = rows.astype(np.float32).reshape(*rows.shape[:-1], self.width // self.group, self.group)
        codes, scales = _quantise_8(grouped) if self.bits == 8 else _quantise_4(grouped)
        codes = codes.reshape(rows.shape)
        if self.bits == 4:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        return codes, scales

    def load(self, stored: Tensor, scales: Tensor | None, dtype: Any) -> Tensor:
        """The values that attention reads: ``dtype`` [..., width]."""
        if not self.quantised:
            return stored.astype(dtype)
        assert scales is not None
        codes = stored
        if self.bits == 4:
            codes = np.stack([stored & 15, stored >> 4], axis=-1)
        grouped = codes.reshape(*stored.shape[:-1], self.width // self.group, self.group).astype(np.float32)
        factors = scales.astype(np.float32)[..., None]
        groups = self.width // self.group
        values = grouped * factors[..., :groups, :]
        if self.bits == 4:
            values = values + factors[..., groups:, :]
        return values.reshape(*stored.shape[:-1], self.width).astype(dtype)


def _quantise_8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., groups, group] and float16 [..., groups] of float32 [..., groups, group]."""
    scale = (np.abs(x).max(axis=-1) / np.float32(_LARGEST_8)).astype(np.float16)
    codes = np.clip(_ratio(x, scale), -_LARGEST_8, _LARGEST_8)
    return codes.astype(np.int8), scale


def _quantise_4(x: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [..., groups, group] and float16 [..., 2 * groups], scales then minima."""
    low = x.min(axis=-1).astype(np.float16)
    spread = x.max(axis=-1) - low.astype(np.float32)
    scale = (spread / np.float32(_LARGEST_4)).astype(np.float16)
    codes = np.clip(_ratio(x - low.astype(np.float32)[..., None], scale), 0, _LARGEST_4)
    return codes.astype(np.uint8), np.concatenate([scale, low], axis=-1)


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    """rint(x / scale), 0 where the scale is 0."""
    divisor = scale.astype(np.float32)[..., None]
    quotient = np.divide(x, divisor, out=np.zeros_like(x), where=divisor != 0)
    return np.rint(quotient)
