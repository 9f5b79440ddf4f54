"""The two halves of generation, which are measured apart."""

from __future__ import annotations

from chai_export.choice import Choice


class Phase(Choice):
    """One token after many, or many tokens at once."""

    DECODE = "decode"
    PREFILL = "prefill"
