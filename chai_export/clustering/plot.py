"""The error curves as a picture: one small panel per layer, the chosen R marked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.targets import FileKind, contains
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError, UsageError

_MOST_COLUMNS = 6
_PANEL_INCHES = (2.1, 1.7)
# Programs that made pictures are named in them. No dates: the same curves give the same file.
_PROGRAM = "chai_export error curves"
_METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": _PROGRAM},
    "svg": {"Creator": _PROGRAM, "Date": None},
    "pdf": {"Creator": _PROGRAM, "CreationDate": None},
}
PICTURE = FileKind("a picture of error curves by chai_export", contains(_PROGRAM.encode()))
_CURVE, _CHOSEN = "#2b5c8a", "#c4401c"


def plot_curves(clusters: Clusters, path: str | Path) -> None:
    """Draw the error curves into a file whose ending names the format (.png, .svg, .pdf).

    All panels have one scale, so that a layer with little error looks like one. Point and title give R.

    Raises:
        ChaiError: there are no curves, the file cannot be written, or another file is in its place.
        UsageError: the ending names no picture format.
    """

    kind = picture_format(path)
    with atomic_file(path, PICTURE) as file:
        draw_curves(clusters, file, kind)


def picture_format(path: str | Path) -> str:
    """The picture format that the ending of a name stands for.

    Raises:
        UsageError: none that we write.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in _METADATA:
        raise UsageError(f"--plot {path}: choose a name that ends in .png, .svg or .pdf")
    return kind


def draw_curves(clusters: Clusters, path: Path, kind: str) -> None:
    """As :func:`plot_curves`, in a given format and into a file that nobody else sees yet.

    Raises:
        ChaiError: there are no curves.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not clusters.error_curves:
        raise ChaiError(f"{clusters.origin} has no error curves to draw; calibrate again")
    layers = len(clusters.error_curves)
    columns = min(_MOST_COLUMNS, layers)
    rows = math.ceil(layers / columns)
    figure = Figure(
        figsize=(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + 0.6), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    largest = max(max(curve) for curve in clusters.error_curves) or 1.0
    for index, axes in enumerate(panels.flat):
        if index < layers:
            _panel(axes, index, clusters.error_curves[index], clusters.kept_heads[index])
            axes.set_ylim(-0.04 * largest, 1.04 * largest)
        else:
            axes.set_axis_off()
    figure.supxlabel("KV heads kept", fontsize=9)
    figure.supylabel("clustering error", fontsize=9)
    saved = "" if clusters.kv_bytes_saved is None else f", {clusters.kv_bytes_saved:.1%} of KV bytes saved"
    figure.suptitle(f"{clusters.model or 'model'}: kept KV heads per layer{saved}", fontsize=10)
    figure.savefig(path, format=kind, metadata=_METADATA[kind])


def _panel(axes: Any, layer: int, curve: tuple[float, ...], kept: int) -> None:
    axes.plot(range(1, len(curve) + 1), curve, color=_CURVE, linewidth=1.3)
    axes.axvline(kept, color=_CHOSEN, linewidth=0.8, linestyle=":")
    axes.plot([kept], [curve[kept - 1]], "o", color=_CHOSEN, markersize=4.5)
    axes.set_title(f"layer {layer}: {kept} of {len(curve)}", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.5)
