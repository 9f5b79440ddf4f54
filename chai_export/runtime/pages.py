"""The pages of a pool: which are free, which row holds which, and how many a row was promised.

Only numbers; the memory is in :mod:`chai_export.runtime.cache`. The rules:

* A row is *promised* all the pages that it can ever need, or none. So a row that has begun never waits for a
  page, and no two rows can wait for each other.
* It *takes* a page when its text reaches it, and gives all of them back when its text has ended.
* A page has as many *references* as rows that hold it, and one more for each time that it is *retained* for
  rows to come; it is free when it has none. Rows share whole pages of a common beginning only, to which none
  of them writes again.
* Of layers with a window a row holds its last ``span`` positions at most, in a pool of their own, and is
  promised pages for so many. It *slides*: before a call it gives back the pages that no coming token sees.
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
    """``promised`` counts the pages that the row may hold, those in ``pages`` included; the first ``passed``
    of these it holds no more, and they are -1."""

    promised: int
    pages: list[int] = field(default_factory=list)
    passed: int = 0

    @property
    def held(self) -> int:
        return len(self.pages) - self.passed


class PagePool:
    """``pages`` pages of ``page_length`` positions, all free at first.

    Args:
        pages: in the pool (N).
        page_length: positions of a page (L).
        span: positions that a row holds at most at one time; 0: as many as it has.

    Attributes:
        pages: in the pool (N).
        page_length: positions of a page (L).
        peak: the largest number of pages that were held at one time.
        touched: pages that were ever held, which are 0 … ``touched`` - 1.
    """

    def __init__(self, pages: int, page_length: int = PAGE_LENGTH, span: int = 0) -> None:
        self.pages = pages
        self.page_length = page_length
        self._span = span
        self.peak = 0
        self.touched = 0
        self._returned: list[int] = []  # the next one last; then come pages that were never touched
        self._references: list[int] = []
        self._rows: dict[int, _Row] = {}

    @property
    def held(self) -> int:
        """Pages that rows hold or that are retained, a shared one once."""
        return self.touched - len(self._returned)

    @property
    def free(self) -> int:
        """Pages that nobody holds, promised or not."""
        return self.pages - self.held

    @property
    def outstanding(self) -> int:
        """Free pages that are promised."""
        return sum(row.promised - row.held for row in self._rows.values())

    def count(self, tokens: int) -> int:
        """Pages that ``tokens`` positions take."""
        return -(-tokens // self.page_length)

    def most(self, tokens: int) -> int:
        """Pages that a row of ``tokens`` holds at most at one time."""
        all_of_them = self.count(tokens)
        return min(all_of_them, self.count(self._span - 1) + 1) if self._span else all_of_them

    def promise(self, row: int, tokens: int) -> bool:
        """Promise a row, new or not, pages for ``tokens`` in all; if they are not there nothing changes."""
        if self.missing(row, tokens):
            return False
        found = self._rows.setdefault(row, _Row(0))
        found.promised = max(found.promised, self.most(tokens))
        return True

    def missing(self, row: int, tokens: int) -> int:
        """Pages that are lacking for a promise."""
        found = self._rows.get(row)
        wanted = self.most(tokens) - (found.promised if found else 0)
        return max(0, wanted - (self.free - self.outstanding)) if wanted > 0 else 0

    def extend(self, row: int, tokens: int) -> None:
        """Take pages for a row until they reach ``tokens``, of what it was promised."""
        found = self._rows[row]
        assert self.count(tokens) - found.passed <= found.promised, "a row grows past its promise"
        while len(found.pages) < self.count(tokens):
            if not self._returned:
                self._returned.append(self.touched)
                self._references.append(0)
                self.touched += 1
            page = self._returned.pop()
            self._references[page] = 1
            found.pages.append(page)
        self.peak = max(self.peak, self.held)

    def slide(self, row: int, first: int) -> None:
        """Give back the pages of a row that lie before position ``first``, which its next tokens still see.

        A row that slid past it is computed anew, and gives back all of them.
        """
        found = self._rows[row]
        passed = min(first // self.page_length, len(found.pages))
        if passed < found.passed:
            self.forget(found.pages[: found.passed - 1 : -1])
            found.pages, found.passed = [], 0
        else:
            self.forget(found.pages[found.passed : passed][::-1])
            found.pages[:passed], found.passed = [-1] * passed, passed

    def share(self, row: int, source: int, tokens: int) -> int:
        """Begin a new row with the whole pages among the first ``tokens`` of ``source``; how many tokens."""
        assert row not in self._rows
        shared = self._rows[source].pages[: tokens // self.page_length]
        for page in shared:
            self._references[page] += 1
        self._rows[row] = _Row(len(shared), list(shared))
        return len(shared) * self.page_length

    def adopt(self, row: int, pages: Sequence[int]) -> None:
        """Begin a new row with whole pages that are held or retained; the first may be -1, for none."""
        assert row not in self._rows
        passed = next((i for i, page in enumerate(pages) if page >= 0), len(pages))
        self.retain(pages[passed:])
        self._rows[row] = _Row(len(pages) - passed, list(pages), passed)

    def retain(self, pages: Sequence[int]) -> None:
        """Keep pages that are not free when their rows end."""
        for page in pages:
            assert self.references(page), "a free page has nothing to keep"
            self._references[page] += 1

    def forget(self, pages: Sequence[int]) -> None:
        """Keep pages no longer, once for each time that they were retained."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._returned.append(page)

    def references(self, page: int) -> int:
        """Rows that hold a page, and the times that it is retained."""
        return self._references[page] if page < self.touched else 0

    def release(self, row: int) -> None:
        """Give back what a row holds and was promised."""
        found = self._rows.pop(row)
        self.forget(found.pages[found.passed :][::-1])

    def untouched_after(self, row: int, tokens: int) -> int:
        """Pages never touched so far that rows would hold at worst, if ``row`` were promised ``tokens``."""
        found = self._rows.get(row)
        wanted = max(0, self.most(tokens) - (found.promised if found else 0))
        return max(0, self.held + self.outstanding + wanted - self.touched)

    def pages_of(self, row: int) -> tuple[int, ...]:
        """The pages of a row in the order of its positions, -1 for those that it slid past."""
        return tuple(self._rows[row].pages)

    def table(self, rows: Sequence[int]) -> NDArray[np.int32]:
        """``page_table`` of these rows: int32 [B, M], M the most pages that one reaches, -1 for none."""
        lists = [self._rows[row].pages for row in rows]
        table = np.full((len(lists), max(1, *map(len, lists))), -1, np.int32)
        for line, pages in zip(table, lists, strict=True):
            line[: len(pages)] = pages
        return table
