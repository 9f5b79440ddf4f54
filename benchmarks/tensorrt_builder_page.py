"""The tables of docs/tensorrt.md from the results of tensorrt_builder.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chai_export.bundle.atomic import atomic_file

Row = dict[str, Any]
_DTYPES = ("float32", "float16", "bfloat16")


def write(page: Path, results: Row) -> None:
    """Replace what stands between the marks of each table."""
    text = page.read_text(encoding="utf-8")
    for name, table in {"builder": _summary, "fixtures": _fixtures, "families": _families}.items():
        mark, end = f"<!-- {name}: made by benchmarks/tensorrt_builder.py -->", "<!-- end -->"
        pattern = re.compile(re.escape(mark) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no place for the table {name!r}")
        text = pattern.sub(f"{mark}\n{table(results)}\n{end}".replace("\\", r"\\"), text)
    with atomic_file(page) as partial:
        partial.write_text(text, encoding="utf-8")


def _summary(results: Row) -> str:
    machine, versions, rows = results["machine"], results["versions"], results["rows"]
    built = [row for row in rows if not row["refused"]]
    return (
        f"On {machine['date']}, on {machine['cores']} cores of {machine['processor']} without a GPU, "
        f"TensorRT-RTX {versions['tensorrt-rtx-cu13-bindings']} with polygraphy {versions['polygraphy']} "
        f"built {len(built)} of {len(rows)} networks. Seconds are of processors."
    )


def _fixtures(results: Row) -> str:
    rows = [row for row in results["rows"] if row["source"] != "family"]
    lines = [
        [row["model"], row["dtype"], *_cells(row), row["refused"] or "built"]
        for row in rows
    ]  # fmt: skip
    return _table(["model", "type", "attentions", "layers", "s", "MB", "outcome"], lines)


def _families(results: Row) -> str:
    """One line per family: layers in each dtype, or that it was refused, why below."""
    rows = [row for row in results["rows"] if row["source"] == "family"]
    found = {(row["model"], row["dtype"]): row for row in rows}
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines, notes = [], []
    for name in names:
        cells = []
        for dtype in _DTYPES:
            row = found.get((name, dtype))
            cells.append("" if row is None else "refused" if row["refused"] else str(row["layers"]))
            if row is not None and row["refused"]:
                notes.append(f"{name} in {dtype}: {row['refused']}")
        lines.append([name, *cells])
    table = _table(["family", *(f"layers, {dtype}" for dtype in _DTYPES)], lines)
    return "\n\n".join([table, *notes])


def _cells(row: Row) -> list[str]:
    if row["refused"]:
        return [str(row["attentions"]), "", "", ""]
    return [str(row["attentions"]), str(row["layers"]), f"{row['seconds']:.1f}", f"{row['bytes'] / 1e6:.1f}"]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
