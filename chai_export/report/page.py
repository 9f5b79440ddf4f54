"""The page itself: charts from the collected data, then the template around them."""

from __future__ import annotations

from typing import Any

import numpy as np

from chai_export.report import png, svg
from chai_export.report.growth import growth_axis, squeeze
from chai_export.report.peers import peers
from chai_export.report.plan_chart import plan_chart
from chai_export.units import bytes_text

_TEMPLATE = "template.html"
_MOST_NUMBERED_HEADS = 40
_EXACT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


def render(data: dict[str, Any]) -> str:
    """The HTML of a report; ``data`` as :func:`chai_export.report.stage.report` collects it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("chai_export.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(bytes=bytes_text, percent=lambda value: f"{value:.1%}")
    others = peers(data["compare"])
    html: str = environment.get_template(_TEMPLATE).render(
        **data,
        curves=_curves(data["clusters"]["error_curves"], data["bundle"]["kept_heads"], "clustering error"),
        damage=_curves(data["clusters"].get("kl_curves") or [], data["bundle"]["kept_heads"], "divergence"),
        matrices=_matrices(data["correlations"], data["head_maps"]["together"]),
        maps=_maps(data["head_maps"]),
        stored=_stored(data["bundle"]),
        plan_chart=plan_chart(data["plan"], others),
        peers=others,
        cache_chart=_cache_chart(data["cache"]),
        tradeoff=tradeoff(data),
        tradeoff_chart=_tradeoff_chart(tradeoff(data), chosen_point(data)),
        chosen=chosen_point(data),
    )
    return html


def tradeoff(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The op's own rows of a comparison of clustering rules, fewest bytes saved first.

    At the probe length nearest the bundle's; of several allocations of the same bytes the best by divergence.
    """
    if data["compare"] is None or "results" not in data["compare"]:
        return []
    rows = [row for row in data["compare"]["results"] if row["method"] == "chai"]
    lengths = {row["probe_tokens"] for row in rows}
    wanted = data["bundle"]["probe_tokens"]
    length = min(lengths, key=lambda probe: abs(probe - wanted), default=None)
    best: dict[float, dict[str, Any]] = {}
    for row in rows:
        saved = row["kv_bytes_saved"]
        if row["probe_tokens"] == length and (saved not in best or row["kl"] < best[saved]["kl"]):
            best[saved] = row
    return [best[saved] for saved in sorted(best)]


def chosen_point(data: dict[str, Any]) -> dict[str, float] | None:
    """Bytes saved and change of perplexity of this bundle: from ``eval``, else from ``compare``."""
    saved = data["bundle"]["kv_bytes_saved"]
    if data["eval"] is not None:
        change = data["eval"]["chai"]["perplexity"] / data["eval"]["all"]["perplexity"] - 1
        return {"kv_bytes_saved": saved, "perplexity_change": change}
    for row in tradeoff(data):
        if list(row["kept_heads"]) == list(data["bundle"]["kept_heads"]):
            return {"kv_bytes_saved": saved, "perplexity_change": row["perplexity_change"]}
    return None


def _curves(curves: list[list[float]], kept_heads: list[int], what: str) -> list[dict[str, Any]]:
    panels = []
    top = max((max(curve) for curve in curves), default=0.0) or 1.0
    for layer, (curve, kept) in enumerate(zip(curves, kept_heads, strict=False)):
        left = curve[kept - 1] / curve[0] if curve[0] else 0.0
        text = (
            f"Layer {layer}: {what} from {curve[0]:.3g} with one KV head kept to {curve[-1]:.3g} with all "
            f"{len(curve)}; {kept} are kept, where {left:.1%} of the first value is left."
        )
        panels.append(
            {
                "layer": layer,
                "kept": kept,
                "of": len(curve),
                "left": left,
                "image": svg.small_curve(text, curve, kept, top),
            }
        )
    return panels


def _matrices(correlations: list[Any] | None, together: list[Any]) -> list[dict[str, Any]]:
    panels = []
    for layer, matrix in enumerate(together if correlations is None else correlations):
        values = np.asarray(matrix, dtype=np.float64)
        others = values[~np.eye(len(values), dtype=bool)]
        mean, high = (float(others.mean()), float((others > 0.95).mean())) if others.size else (0.0, 0.0)
        subject = "share of prompts with a common representative" if correlations is None else "correlation"
        text = (
            f"Layer {layer}: {subject} of {len(values)} query heads, on average {mean:.2f} "
            f"between different heads; {high:.0%} of the pairs are above 0.95."
        )
        panels.append({"layer": layer, "address": png.data_address(values), "text": text, "high": high})
    return panels


def _maps(head_maps: dict[str, Any]) -> list[dict[str, Any]]:
    panels = []
    for prompt, maps in zip(head_maps["prompts"], head_maps["maps"], strict=True):
        distinct = [len(set(row)) for row in maps]
        text = (
            f"Head map for the prompt “{prompt[:60]}”: distinct representatives per layer "
            f"{', '.join(map(str, distinct))} of {len(maps[0])} query heads."
        )
        image = svg.map_rows(text, maps, numbers=len(maps[0]) <= _MOST_NUMBERED_HEADS)
        panels.append({"prompt": prompt, "distinct": distinct, "image": image})
    return panels


def _cache_chart(rows: list[dict[str, int]]) -> Any:
    last = rows[-1]
    unit, name = next(
        (size, label) for size, label in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))
        if last["all"] >= size
    )  # fmt: skip
    top = last["all"] / unit
    x = svg.Axis(
        "tokens in the sequence", 0, last["tokens"], svg.ticks(0, last["tokens"]), lambda v: f"{v:.0f}"
    )
    y = svg.Axis(f"KV cache, {name}", 0, top, svg.ticks(0, top))
    series = [
        svg.Series(label, [(0, 0), *((row["tokens"], row[key] / unit) for row in rows)], style)
        for label, key, style in (("all heads", "all", "two"), ("CHAI", "chai", "one"))
    ]
    text = (
        f"KV cache of one sequence against its length: at {last['tokens']} tokens {bytes_text(last['all'])} "
        f"with all heads and {bytes_text(last['chai'])} with CHAI."
    )
    return svg.line_chart(text, series, x, y)


def _tradeoff_chart(rows: list[dict[str, Any]], chosen: dict[str, float] | None) -> Any:
    if not rows:
        return None
    points = [(100 * row["kv_bytes_saved"], 100 * row["perplexity_change"]) for row in rows]
    here = None
    if chosen is not None:
        here = (100 * chosen["kv_bytes_saved"], 100 * chosen["perplexity_change"])
    every = [*points, *([here] if here else [])]
    most = max(a for a, _ in every)
    low, top = min(0.0, *(b for _, b in every)), max(1.0, *(b for _, b in every))
    x = svg.Axis("KV-cache bytes saved, %", 0, most, svg.ticks(0, most))
    y = growth_axis(low, top)
    text = "Perplexity against KV-cache bytes saved: " + "; ".join(
        f"{a:.1f} % saved, {b:+.2f} %" for a, b in points
    )
    mark = None
    if here is not None:
        text += f". This bundle: {here[0]:.1f} % saved, {here[1]:+.2f} %."
        mark = ((here[0], squeeze(here[1])), "this bundle")
    line = svg.Series("chai", [(a, squeeze(b)) for a, b in points])
    return svg.line_chart(text, [line], x, y, mark=mark, dots=True)


def _stored(bundle: dict[str, Any]) -> Any:
    """The cache of every layer as a picture: heads, their bits as colour."""
    every, exact = bundle["num_kv_heads"], _EXACT_BITS[bundle["dtype"]]
    rows = [
        ([key or exact] * kept + [0] * (every - kept), [value or exact] * every)
        for kept, key, value in zip(
            bundle["kept_heads"], bundle["key_bits"], bundle["value_bits"], strict=True
        )
    ]
    text = "What each layer caches: " + "; ".join(
        f"layer {layer}: keys of {sum(b > 0 for b in keys)} of {every} heads in {keys[0]} bits, values in "
        f"{values[0]} bits"
        for layer, (keys, values) in enumerate(rows)
    )
    return {
        "image": svg.cache_rows(text, rows, ("keys", "values")),
        "bits": sorted({b for keys, values in rows for b in (*keys, *values) if b}, reverse=True),
    }
