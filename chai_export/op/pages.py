"""Pages: where the positions of a row lie in the pool, and which of them a call may touch.

A pool has N pages of L positions. Row b keeps its positions j*L … j*L+L-1 in page ``page_table[b, j]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Tensor = NDArray[Any]


def spanned(start: int, stop: int, page_size: int) -> range:
    """Indices into a row of the table: the pages that hold the positions ``start`` … ``stop`` - 1."""
    return range(start // page_size, -(-stop // page_size)) if stop > start else range(0)


def read(pool: Tensor, table: Int32Array, start: int, stop: int) -> Tensor:
    """Positions ``start`` … ``stop`` - 1 of one row: [N, X, L, W] to [X, stop - start, W]."""
    pages, offsets = _places(table, start, stop, pool.shape[2])
    return pool[pages, :, offsets].swapaxes(0, 1)


def write(pool: Tensor, table: Int32Array, start: int, rows: Tensor, slot: int | slice) -> None:
    """Put [stop - start, W] into ``slot``, or [X, stop - start, W] into every slot, from ``start`` on."""
    pages, offsets = _places(table, start, start + rows.shape[-2], pool.shape[2])
    if isinstance(slot, int):
        pool[pages, slot, offsets] = rows
    else:
        pool[pages, :, offsets] = rows.swapaxes(0, 1)


def check_tables(
    page_table: Int32Array,
    rows: Sequence[int],
    seen: Sequence[range],
    written: Sequence[range],
    pages: int,
    page_size: int,
) -> None:
    """Raise ValueError unless each row has the pages it needs and writes to none but its own.

    Args:
        page_table: int32 [B, M].
        rows: indices of the active rows.
        seen: for each of them, the positions that the call reads or writes.
        written: those that it writes.
        pages: N.
        page_size: L.
    """
    uses: Counter[int] = Counter()
    for row, positions in zip(rows, seen, strict=True):
        for index in spanned(positions.start, positions.stop, page_size):
            page = int(page_table[row, index])
            if not 0 <= page < pages:
                raise ValueError(f"row {row}: page_table entry {index} is {page}, the pool has {pages} pages")
            uses[page] += 1
    for row, positions in zip(rows, written, strict=True):
        for index in spanned(positions.start, positions.stop, page_size):
            page = int(page_table[row, index])
            if uses[page] > 1:
                raise ValueError(f"row {row}: page {page} is written to and stands in this call twice")


def _places(
    table: Int32Array, start: int, stop: int, page_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    positions = np.arange(start, stop)
    return table[positions // page_size].astype(np.int64), positions % page_size
