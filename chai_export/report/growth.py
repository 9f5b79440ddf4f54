"""The axis of perplexity: what it grew by, in per cent."""

from __future__ import annotations

import math

from chai_export.report import svg

_TICKS = (-3, -1, 0, 1, 3, 10, 30, 100, 300, 1000, 10000)


def growth_axis(low: float, top: float) -> svg.Axis:
    """From ``low`` to ``top`` per cent, for points at :func:`squeeze` of their values."""
    labels = {squeeze(tick): f"{tick:g}" for tick in _TICKS if low <= tick <= top}
    return svg.Axis("perplexity, % more", squeeze(low), squeeze(top), list(labels), labels.__getitem__)


def squeeze(percent: float) -> float:
    """Logarithmic beyond about one percent, so that 0.5 % and 150 % can stand on one axis."""
    return math.copysign(math.log1p(abs(percent)), percent)
