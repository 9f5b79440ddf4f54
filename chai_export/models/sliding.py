"""Sliding windows in configurations: which layers have one, and of how many tokens."""

from __future__ import annotations

from typing import Any

SLIDING = "sliding_attention"


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer, as transformers names them; empty where all are plain and none is named."""
    kinds = list(getattr(config, "layer_types", None) or [])
    if not kinds and getattr(config, "sliding_window", None):
        # Families without a list of kinds apply their window everywhere, unless a switch turns it off.
        layers = getattr(config, "num_hidden_layers", 0)
        kinds = [SLIDING] * layers if getattr(config, "use_sliding_window", True) else []
    return kinds


def window_of(config: Any) -> int | None:
    """Tokens that a sliding layer sees, its own included; None if no layer slides."""
    window = getattr(config, "sliding_window", None)
    return int(window) if window and SLIDING in layer_kinds(config) else None
