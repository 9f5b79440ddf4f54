"""What an export is asked to store keys and values in, and the group of elements that share a scale."""

from __future__ import annotations

from dataclasses import dataclass

from chai_export.arguments import shown
from chai_export.errors import ChaiError, UsageError
from chai_export.op.heads import HeadCounts
from chai_export.op.storage import BITS, SCALES_PER_GROUP

GROUPS = (32, 16, 8, 4)
"""Elements that may share a scale, the best first: smaller groups are closer to the model and take more."""


@dataclass(frozen=True)
class Precision:
    """Bits of keys and of values, 0 (the model's dtype), 16, 8 or 4: one number for all layers, or one each.

    ``elements`` share a scale; None: as many as can.
    """

    key_bits: int | tuple[int, ...] = 0
    value_bits: int | tuple[int, ...] = 0
    elements: int | None = None

    @staticmethod
    def asked(key_bits: int | None, value_bits: int | None, otherwise: Precision | None = None) -> Precision:
        """What a caller asks for; what he does not name is that of ``otherwise``, or :data:`DEFAULT`'s.

        Raises:
            UsageError: there is no such storage.
        """
        for name, bits in (("key_bits", key_bits), ("value_bits", value_bits)):
            if bits is not None and (isinstance(bits, bool) or bits not in BITS):
                raise UsageError(f"{name} is {shown(bits)}; give 16, 8 or 4 (0 is the model's dtype)")
        otherwise = otherwise or DEFAULT
        return Precision(
            otherwise.key_bits if key_bits is None else key_bits,
            otherwise.value_bits if value_bits is None else value_bits,
            otherwise.elements,
        )

    def by_layer(self, layers: int) -> tuple[list[int], list[int]]:
        """Bits of keys and bits of values for each of so many layers.

        Raises:
            ChaiError: they are for another number of layers.
        """
        found = []
        for bits in (self.key_bits, self.value_bits):
            of_layers = [bits] * layers if isinstance(bits, int) else list(bits)
            if len(of_layers) != layers:
                raise ChaiError(
                    f"the plan is for {len(of_layers)} layers, the model has {layers}; calibrate this model"
                )
            found.append(of_layers)
        return found[0], found[1]

    def group(self, heads: HeadCounts) -> int:
        """Elements that share a scale: as given, or the largest group that divides the quantised rows.

        Raises:
            ChaiError: none does.
        """
        keys, values = (
            min((b for b in _all(bits) if b in SCALES_PER_GROUP), default=0)
            for bits in (self.key_bits, self.value_bits)
        )
        rows = (
            ("keys", "--key-bits", keys, heads.head_dim),
            ("values", "--value-bits", values, heads.value_head_dim),
        )
        quantised = [row for row in rows if row[2] in SCALES_PER_GROUP]
        for group in GROUPS if self.elements is None else (self.elements,):
            if all(width % group == 0 for *_, width in quantised):
                return group
        what, option, bits, width = min(quantised, key=lambda row: row[3] & -row[3])
        raise ChaiError(
            f"{what} of {width} elements cannot be stored in {bits} bits: groups of "
            f"{', '.join(map(str, GROUPS))} share a scale, and none divides {width}; use {option} 16 or 0"
        )


def _all(bits: int | tuple[int, ...]) -> tuple[int, ...]:
    return (bits,) if isinstance(bits, int) else bits


EXACT = Precision()
"""Rows as they are computed."""
SAFE_BITS = 8
"""Costs next to nothing: of keys and values where commands and recipes name neither a plan nor bits."""

DEFAULT = EXACT
"""Where nobody asks for bits."""
