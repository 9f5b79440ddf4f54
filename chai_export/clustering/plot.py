"""The error curves as a picture: one small panel per layer, the chosen R marked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError, UsageError

_MOST_COLUMNS = 6
_PANEL_INCHES = (2.1, 1.7)
_CURVE, _CHOSEN = "#2b5c8a", "#c4401c"


def plot_curves(clusters: Clusters, path: str | Path) -> None:
    """Draw the error curves into a file whose ending names the format (.png, .svg, .pdf).

    Each panel's axis is relative to the error with one head kept; the point and the title give R.

    Raises:
        ChaiError: there are no curves, or the file cannot be written.
        UsageError: the ending names no picture format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if not clusters.error_curves:
        raise ChaiError(f"{clusters.origin} has no error curves to draw; calibrate again")
    layers = len(clusters.error_curves)
    columns = min(_MOST_COLUMNS, layers)
    rows = math.ceil(layers / columns)
    figure = Figure(
        figsize=(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + 0.6), dpi=130, layout="constrained"
    )
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise UsageError(f"--plot {path}: choose a name that ends in .png, .svg or .pdf")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index < layers:
            _panel(axes, index, clusters.error_curves[index], clusters.kept_heads[index])
        else:
            axes.set_axis_off()
    figure.supxlabel("KV heads kept", fontsize=9)
    figure.supylabel("clustering error, 1 kept = 1", fontsize=9)
    saved = "" if clusters.kv_bytes_saved is None else f", {clusters.kv_bytes_saved:.1%} of KV bytes saved"
    figure.suptitle(f"{clusters.model or 'model'}: kept KV heads per layer{saved}", fontsize=10)
    _save(figure, path, kind)


def _panel(axes: Any, layer: int, curve: tuple[float, ...], kept: int) -> None:
    scale = curve[0] or 1.0
    relative = [error / scale for error in curve]
    axes.plot(range(1, len(curve) + 1), relative, color=_CURVE, linewidth=1.3)
    axes.axvline(kept, color=_CHOSEN, linewidth=0.8, linestyle=":")
    axes.plot([kept], [relative[kept - 1]], "o", color=_CHOSEN, markersize=4.5)
    axes.set_title(f"layer {layer}: {kept} of {len(curve)}", fontsize=8)
    axes.set_ylim(-0.04, 1.04)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.5)


def _save(figure: Any, path: Path, kind: str) -> None:
    from chai_export.bundle.atomic import atomic_file

    # No dates: the same curves give the same file.
    metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else {}
    with atomic_file(path) as partial:
        figure.savefig(partial, format=kind, metadata=metadata)
