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
    """Bits of keys and of values: 0 (the model's dtype), 16, 8 or 4."""

    key_bits: int = 0
    value_bits: int = 0

    @staticmethod
    def asked(key_bits: int | None, value_bits: int | None) -> Precision:
        """What a caller asks for; what he does not name is :data:`DEFAULT`'s.

        Raises:
            UsageError: there is no such storage.
        """
        for name, bits in (("key_bits", key_bits), ("value_bits", value_bits)):
            if bits is not None and (isinstance(bits, bool) or bits not in BITS):
                raise UsageError(f"{name} is {shown(bits)}; give 16, 8 or 4 (0 is the model's dtype)")
        return Precision(
            DEFAULT.key_bits if key_bits is None else key_bits,
            DEFAULT.value_bits if value_bits is None else value_bits,
        )

    def group(self, heads: HeadCounts) -> int:
        """The largest group that divides the rows that are quantised.

        Raises:
            ChaiError: none does.
        """
        rows = (
            ("keys", "--key-bits", self.key_bits, heads.head_dim),
            ("values", "--value-bits", self.value_bits, heads.value_head_dim),
        )
        quantised = [row for row in rows if row[2] in SCALES_PER_GROUP]
        for group in GROUPS:
            if all(width % group == 0 for *_, width in quantised):
                return group
        what, option, bits, width = min(quantised, key=lambda row: row[3] & -row[3])
        raise ChaiError(
            f"{what} of {width} elements cannot be stored in {bits} bits: groups of "
            f"{', '.join(map(str, GROUPS))} share a scale, and none divides {width}; use {option} 16, or none"
        )


EXACT = Precision()
"""Rows as they are computed."""
DEFAULT = EXACT
"""Where nobody asks for bits."""
