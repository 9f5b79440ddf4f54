"""The pages of a pool: which are free, which row holds which, and how many a row was promised.

Only numbers; the memory is in :mod:`chai_export.runtime.cache`. The rules:

* A row is *promised* all the pages that it can ever need, or none. So a row that has begun never waits for a
  page, and no two rows can wait for each other.
* It *takes* a page when its text reaches it, and gives all of them back when its text has ended.
* A page has as many *references* as rows that hold it, and one more for each time that it is *retained* for
  rows to come; it is free when it has none. Rows share whole pages of a common beginning only, to which none
  of them writes again.
* The page that was given back last is taken first: memory that was never touched stays untouched. Of a row
  that ends, its first page.

tests/data/paging_cases.json holds every runner to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PAGE_LENGTH = 128
"""Positions per page. A row wastes half a page on average, and each page costs the kernel a little: with 128
the CPU kernel takes 1 to 3 % more than on a cache in one piece, with 64 it took 6 %."""


@dataclass
class _Row:
    """``promised`` counts the pages that the row may hold, those in ``pages`` included."""

    promised: int
    pages: list[int] = field(default_factory=list)


class PagePool:
    """``pages`` pages of ``page_length`` positions, all free at first.

    Attributes:
        pages: in the pool (N).
        page_length: positions of a page (L).
        peak: the largest number of pages that were held at one time.
        touched: pages that were ever held, which are 0 … ``touched`` - 1.
    """

    def __init__(self, pages: int, page_length: int = PAGE_LENGTH) -> None:
        self.pages = pages
        self.page_length = page_length
        self.peak = 0
        self.touched = 0
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages
        self._rows: dict[int, _Row] = {}

    @property
    def held(self) -> int:
        """Pages that rows hold or that are retained, a shared one once."""
        return self.pages - len(self._free)

    @property
    def outstanding(self) -> int:
        """Free pages that are promised."""
        return sum(row.promised - len(row.pages) for row in self._rows.values())

    def count(self, tokens: int) -> int:
        """Pages that ``tokens`` positions take."""
        return -(-tokens // self.page_length)

    def promise(self, row: int, tokens: int) -> bool:
        """Promise a row, new or not, pages for ``tokens`` in all; if they are not there nothing changes."""
        if self.missing(row, tokens):
            return False
        found = self._rows.setdefault(row, _Row(0))
        found.promised = max(found.promised, self.count(tokens))
        return True

    def missing(self, row: int, tokens: int) -> int:
        """Pages that are lacking for a promise."""
        found = self._rows.get(row)
        wanted = self.count(tokens) - (found.promised if found else 0)
        return max(0, wanted - (len(self._free) - self.outstanding)) if wanted > 0 else 0

    def extend(self, row: int, tokens: int) -> None:
        """Take pages for a row until it holds ``tokens``, of what it was promised."""
        found = self._rows[row]
        assert self.count(tokens) <= found.promised, "a row grows past its promise"
        while len(found.pages) < self.count(tokens):
            page = self._free.pop()
            self._references[page] = 1
            found.pages.append(page)
            self.touched = max(self.touched, page + 1)
        self.peak = max(self.peak, self.held)

    def share(self, row: int, source: int, tokens: int) -> int:
        """Begin a new row with the whole pages among the first ``tokens`` of ``source``; how many tokens."""
        assert row not in self._rows
        shared = self._rows[source].pages[: tokens // self.page_length]
        for page in shared:
            self._references[page] += 1
        self._rows[row] = _Row(len(shared), list(shared))
        return len(shared) * self.page_length

    def adopt(self, row: int, pages: Sequence[int]) -> None:
        """Begin a new row with whole pages that are held or retained."""
        assert row not in self._rows
        self.retain(pages)
        self._rows[row] = _Row(len(pages), list(pages))

    def retain(self, pages: Sequence[int]) -> None:
        """Keep pages that are not free when their rows end."""
        for page in pages:
            assert self._references[page], "a free page has nothing to keep"
            self._references[page] += 1

    def forget(self, pages: Sequence[int]) -> None:
        """Keep pages no longer, once for each time that they were retained."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def references(self, page: int) -> int:
        """Rows that hold a page, and the times that it is retained."""
        return self._references[page]

    def release(self, row: int) -> None:
        """Give back what a row holds and was promised."""
        self.forget(self._rows.pop(row).pages[::-1])

    def untouched_after(self, row: int, tokens: int) -> int:
        """Pages never touched so far that rows would hold at worst, if ``row`` were promised ``tokens``."""
        found = self._rows.get(row)
        wanted = max(0, self.count(tokens) - (found.promised if found else 0))
        return max(0, self.held + self.outstanding + wanted - self.touched)

    def pages_of(self, row: int) -> tuple[int, ...]:
        """The pages of a row in the order of its positions."""
        return tuple(self._rows[row].pages)

    def table(self, rows: Sequence[int]) -> NDArray[np.int32]:
        """``page_table`` of these rows: int32 [B, M], M the most pages that one holds, -1 for none."""
        lists = [self._rows[row].pages for row in rows]
        table = np.full((len(lists), max(1, *map(len, lists))), -1, np.int32)
        for line, pages in zip(table, lists, strict=True):
            line[: len(pages)] = pages
        return table
