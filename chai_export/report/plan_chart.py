"""The chart of a plan: expected loss against bytes, the chosen point, and other methods around it."""

from __future__ import annotations

from typing import Any

from chai_export.report import svg
from chai_export.report.growth import growth_axis, squeeze

_MOST_GROWTH = 100.0
"""Per cent of perplexity that the chart goes to."""


def plan_chart(plan: dict[str, Any] | None, others: dict[str, Any] | None) -> dict[str, Any] | None:
    """The chart, or None where there is nothing to draw.

    Args:
        plan: with ``tradeoff``, as :func:`chai_export.report.collect.planned` has it.
        others: as :func:`chai_export.report.peers.peers` has them.

    Returns:
        ``image``; ``line``: whether it has the measurement's best plans; ``left_out``: points of others that
        lie above it.
    """
    points = _expected(plan)
    drawn = (
        [row for row in others["rows"] if row["perplexity_change"] <= _MOST_GROWTH / 100] if others else []
    )
    if not points and not drawn:
        return None
    here = _chosen(plan)
    seen = [b for _, b in [*points, *map(_place, drawn), *([here] if here else [])]]
    x = svg.Axis("bytes, % of float16's", 0, 100, svg.ticks(0, 100))
    y = growth_axis(min(0.0, *seen, 0.0), max(1.0, *seen))
    mark = None if here is None else ((here[0], squeeze(here[1])), "this plan")
    line = svg.Series("best plans", [(a, squeeze(b)) for a, b in points])
    image = svg.line_chart(
        _words(points, here, drawn), [line], x, y,
        mark=mark, dots=not drawn, glyphs=[_glyph(row) for row in drawn], height=320 if drawn else 220,
    )  # fmt: skip
    return {
        "image": image,
        "line": bool(points),
        "left_out": len(others["rows"]) - len(drawn) if others else 0,
    }


def _expected(plan: dict[str, Any] | None) -> list[svg.Point]:
    """Bytes and growth of the best plans, per cent."""
    found = [
        (100 * point["kv_bytes_share"], 100 * (point["perplexity_ratio"] - 1))
        for point in (plan["tradeoff"] if plan else ())
    ]
    return [(a, max(b, 0.0)) for a, b in found if b <= _MOST_GROWTH]


def _chosen(plan: dict[str, Any] | None) -> svg.Point | None:
    found = plan and (plan["checked"] or plan["expected"])
    if not plan or not found or plan["kv_bytes_share"] is None:
        return None
    return 100 * plan["kv_bytes_share"], 100 * (found["perplexity_ratio"] - 1)


def _place(row: dict[str, Any]) -> svg.Point:
    return 100 * row["bytes_share"], 100 * row["perplexity_change"]


def _glyph(row: dict[str, Any]) -> svg.Glyph:
    """A letter for each method, a dot for a plan."""
    a, b = _place(row)
    title = f"{row['method']}, {row['setting']}: {a:.1f} % of the bytes, {b:+.2f} % perplexity"
    return svg.Glyph((a, squeeze(b)), row["letter"], title, "op" if row["on_op"] else "other")


def _words(points: list[svg.Point], here: svg.Point | None, drawn: list[dict[str, Any]]) -> str:
    text = "Perplexity against bytes of the cache."
    if points:
        text += " Expected: " + "; ".join(f"{a:.0f} %, {b:+.2f} %" for a, b in points) + "."
    if here is not None:
        text += f" The plan: {here[0]:.1f} %, {here[1]:+.2f} %."
    if drawn:
        named = (
            f"{row['method']} {row['setting']} {_place(row)[0]:.0f} %, {_place(row)[1]:+.2f} %"
            for row in drawn
        )
        text += " Measured by compare: " + "; ".join(named) + "."
    return text
