"""Charts as inline SVG: they scale with the page, follow its colours and carry a text alternative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart; ``style`` is a class of the page's style sheet."""

    name: str
    points: Sequence[Point]
    style: str = "one"


@dataclass(frozen=True)
class Glyph:
    """A point with a letter in its place, or a dot without one; ``style`` is a class of the style sheet."""

    point: Point
    letter: str
    title: str
    style: str


@dataclass(frozen=True)
class Axis:
    """Range and labels of an axis; ``ticks`` are the labelled values."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str] = lambda value: f"{value:g}"

    def at(self, value: float) -> float:
        """Position of a value, 0 … 1; values outside are drawn at the edge."""
        span = self.high - self.low
        return min(1.0, max(0.0, (value - self.low) / span)) if span else 0.5


def line_chart(
    alternative: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    mark: tuple[Point, str] | None = None,
    width: int = 360,
    height: int = 220,
    dots: bool = False,
    glyphs: Sequence[Glyph] = (),
) -> Markup:
    """Lines over common axes, with a legend above when there is more than one.

    Args:
        alternative: what the chart says, for readers who cannot see it.
        series: the lines.
        x, y: the axes.
        mark: a point to stand out, with its label.
        width, height: of the drawing; it is scaled to the page.
        dots: draw the points as well.
        glyphs: single points, drawn above the lines.
    """
    left, right, top, bottom = 52, 12, 12 if len(series) < 2 else 28, 38
    wide, high = width - left - right, height - top - bottom

    def place(point: Point) -> Point:
        return left + x.at(point[0]) * wide, top + (1 - y.at(point[1])) * high

    parts = [_frame(x, y, left, top, wide, high)]
    for index, line in enumerate(series):
        placed = [place(point) for point in line.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if dots:
            parts += [
                f'<circle class="dot {line.style}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in placed
            ]
        if len(series) > 1:
            start = left + index * wide / len(series)
            parts.append(f'<line class="line {line.style}" x1="{start}" y1="12" x2="{start + 16}" y2="12"/>')
            parts.append(f'<text x="{start + 20}" y="16">{escape(line.name)}</text>')
    for glyph in glyphs:
        a, b = place(glyph.point)
        drawn = (
            f'<text class="peer {glyph.style}" text-anchor="middle" x="{a:.1f}" y="{b + 3.5:.1f}">'
            f"{escape(glyph.letter)}</text>"
            if glyph.letter
            else f'<circle class="peer {glyph.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
        )
        parts.append(f"<g><title>{escape(glyph.title)}</title>{drawn}</g>")
    if mark is not None:
        a, b = place(mark[0])
        side = "end" if a > left + wide / 2 else "start"
        shift = -8 if side == "end" else 8
        parts.append(f'<circle class="mark" cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>')
        parts.append(
            f'<text class="mark" text-anchor="{side}" x="{a + shift:.1f}" y="{max(b - 7, top + 8):.1f}">'
            f"{escape(mark[1])}</text>"
        )
    return _image(alternative, width, height, parts)


def small_curve(alternative: str, values: Sequence[float], chosen: int, top: float) -> Markup:
    """A curve over 1 … G without labels, point ``chosen`` marked: one of many panels from 0 to ``top``."""
    width, height, edge = 120, 70, 8

    def place(kept: int) -> Point:
        share = (kept - 1) / max(1, len(values) - 1)
        return edge + share * (width - 2 * edge), edge + (1 - values[kept - 1] / top) * (height - 2 * edge)

    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(place, range(1, len(values) + 1)))
    a, b = place(chosen)
    floor = height - edge
    parts = [
        f'<line class="axis" x1="{edge}" y1="{floor}" x2="{width - edge}" y2="{floor}"/>',
        f'<line class="drop" x1="{a:.1f}" y1="{edge}" x2="{a:.1f}" y2="{floor}"/>',
        f'<polyline class="line one" points="{path}"/>',
        f'<circle class="mark" cx="{a:.1f}" cy="{b:.1f}" r="4"/>',
    ]
    return _image(alternative, width, height, parts)


def map_rows(alternative: str, maps: Sequence[Sequence[int]], *, numbers: bool) -> Markup:
    """A head map: a row per layer, a cell per query head, coloured by the head that represents it.

    Heads that stand for themselves alone are left pale, so that shared ones stand out. ``numbers`` writes
    the representative into each cell; with very many heads it could not be read.
    """
    heads = len(maps[0])
    cell, label = 20, 26
    parts = []
    for layer, row in enumerate(maps):
        y = layer * (cell + 3)
        parts.append(f'<text class="small" x="0" y="{y + 14}">{layer}</text>')
        for head, representative in enumerate(row):
            shared = list(row).count(representative) > 1
            fill = f"hsl({representative * 360 / heads:.0f} 62% 68%)" if shared else "var(--pale)"
            x = label + head * cell
            own = ' class="own"' if head == representative and shared else ""
            title = f"layer {layer}: head {head} uses the scores of head {representative}"
            parts.append(
                f'<g{own}><title>{title}</title><rect x="{x}" y="{y}" width="{cell - 1.5}" height="{cell}" '
                f'style="fill:{fill}"/>'
                f"{_number(representative, x + cell / 2 - 0.75, y + 14) if numbers else ''}</g>"
            )
    return _image(alternative, label + heads * cell, len(maps) * (cell + 3), parts)


def cache_rows(
    alternative: str, layers: Sequence[tuple[Sequence[int], Sequence[int]]], names: tuple[str, str]
) -> Markup:
    """What each layer's cache holds: a row per layer, a cell per KV head, first of keys and then of values.

    Args:
        alternative: what the picture says, for readers who cannot see it.
        layers: bits of the heads of keys and of values of each layer; 0 is a head that is not there.
        names: of the two parts.
    """
    cell, gap, label, top = 14, 18, 26, 18
    heads = max(len(keys) for keys, _ in layers)
    second = label + heads * cell + gap
    parts = [_text(name, x, 11, "") for name, x in zip(names, (label, second), strict=True)]
    for layer, of_parts in enumerate(layers):
        y = top + layer * (cell + 1)
        parts.append(f'<text class="small" x="0" y="{y + 11}">{layer}</text>')
        for name, x, bits in zip(names, (label, second), of_parts, strict=True):
            title = f"layer {layer}, {name}: {', '.join(map(str, bits))} bits"
            size = f'y="{y}" width="{cell - 1.5}" height="{cell - 1}"'
            cells = "".join(
                f'<rect class="bits{of_head}" x="{x + head * cell}" {size}/>'
                for head, of_head in enumerate(bits)
            )
            parts.append(f"<g><title>{title}</title>{cells}</g>")
    width = max(second + max(len(values) for _, values in layers) * cell, 240)
    return _image(alternative, width, top + len(layers) * (cell + 1), parts)


def _number(value: int, x: float, y: float) -> str:
    return f'<text class="cell" x="{x}" y="{y}">{value}</text>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that divide a range into about ``count`` parts."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(x: Axis, y: Axis, left: float, top: float, wide: float, high: float) -> str:
    floor = top + high
    parts = []
    for tick in y.ticks:
        at = round(floor - y.at(tick) * high, 1)
        parts.append(f'<line class="grid" x1="{left}" y1="{at}" x2="{left + wide}" y2="{at}"/>')
        parts.append(_text(y.text(tick), left - 5, at + 4, 'class="tick" text-anchor="end"'))
    for tick in x.ticks:
        at = round(left + x.at(tick) * wide, 1)
        parts.append(_text(x.text(tick), at, floor + 15, 'class="tick" text-anchor="middle"'))
    parts.append(f'<line class="axis" x1="{left}" y1="{floor}" x2="{left + wide}" y2="{floor}"/>')
    parts.append(_text(x.label, left + wide / 2, floor + 32, 'text-anchor="middle"'))
    middle = top + high / 2
    parts.append(_text(y.label, 11, middle, f'text-anchor="middle" transform="rotate(-90 11 {middle:g})"'))
    return "".join(parts)


def _text(content: str, x: float, y: float, attributes: str) -> str:
    return f'<text {attributes} x="{x:g}" y="{y:g}">{escape(content)}</text>'


def _image(alternative: str, width: float, height: float, parts: Sequence[str]) -> Markup:
    label = escape(alternative, quote=True)
    return Markup(
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
