"""The tables of docs/verification.md from the results of logit_noise.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chai_export.bundle.atomic import atomic_file

Row = dict[str, Any]


def write(page: Path, results: Row) -> None:
    """Replace what stands between the marks of each table."""
    tables = {"right": _right, "wrong": _wrong, "machine": _machine}
    replace_tables(page, "logit_noise.py", {name: made(results) for name, made in tables.items()})


def replace_tables(page: Path, script: str, tables: Mapping[str, str]) -> None:
    """Replace what stands between the marks of each of a script's tables."""
    text = page.read_text(encoding="utf-8")
    for name, made in tables.items():
        mark, end = f"<!-- {name}: made by benchmarks/{script} -->", "<!-- end -->"
        pattern = re.compile(re.escape(mark) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no place for the table {name!r}")
        text = pattern.sub(f"{mark}\n{made}\n{end}".replace("\\", r"\\"), text)
    with atomic_file(page) as partial:
        partial.write_text(text, encoding="utf-8")


def _machine(results: Row) -> str:
    machine = results["machine"]
    return (
        f"Measured on {machine['date']} on one thread of a {machine['processor']}, torch {machine['torch']}, "
        f"ONNX Runtime {machine['onnxruntime']}."
    )


def _right(results: Row) -> str:
    lines = []
    for name, model in results["models"].items():
        for dtype in ("float32", "float16", "bfloat16"):
            rows = [row for row in model["right"] if row["dtype"] == dtype]
            lines.append(
                [
                    f"{name} ({model['layers']} layers)" if dtype == "float32" else "",
                    dtype,
                    _number(max(row["largest_difference"] for row in rows)),
                    _number(max(row["median_tolerance"] for row in rows)),
                    f"{max(row['tolerance_used'] for row in rows):.2f}",
                    f"{max(row['formula_constant_median'] for row in rows):.0f}",
                    f"{max(row['formula_constant'] for row in rows):.0f}",
                ]
            )
    columns = ["model", "dtype", "largest difference", "median tolerance", "largest share of a tolerance",
               "c, median", "c, largest"]  # fmt: skip
    return table(columns, lines)


def _wrong(results: Row) -> str:
    """For each mistake the model in which it shows least."""
    names = list(dict.fromkeys(row["what"] for model in results["models"].values() for row in model["wrong"]))
    lines = []
    for what in names:
        cells = [what]
        for dtype in ("float32", "float16", "bfloat16"):
            found = [
                (row["tolerance_used"], name)
                for name, model in results["models"].items()
                for row in model["wrong"]
                if row["what"] == what and row["dtype"] == dtype
            ]
            least, where = min(found)
            caught = sum(used > 1 for used, _ in found)
            cells.append(f"{_number(least)} ({where}); {caught} of {len(found)}")
        lines.append(cells)
    return table(["mistake", "float32", "float16", "bfloat16"], lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
