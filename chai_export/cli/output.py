"""Printing results: JSON on stdout, or tables and lines for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_UNWRAPPED = 10_000


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object on stdout, in ASCII where stdout's encoding cannot hold all of its text."""
    text = json.dumps(result, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(result, indent=2)
    sys.stdout.write(f"{text}\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A plain table on stdout; numbers should come formatted."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # names of nodes are long, and each letter counts
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # A program that reads the table wants a line a row.
    width = None if sys.stdout.isatty() else _UNWRAPPED
    Console(markup=False, highlight=False, width=width).print(table)
