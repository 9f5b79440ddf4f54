"""The pages of rows over all layers: a pool for the layers that see everything, and one for each window.

A row holds a page of the first pool for every page of its positions, and of a window's pool those alone that
its coming tokens still see. What is at one place of a row, a page of each pool, is a *stack*; -1 stands in it
for a page that the row slid past. The first pool is there without such layers too: its pages are numbers then
that name places, and take no memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.graph_io import page_table
from chai_export.runtime.pages import PAGE_LENGTH, PagePool

MOST_TOKENS = 1 << 30
"""Positions of a row that is limited by nothing else."""

Stack = tuple[int, ...]


class RowPages:
    """Pools by window, 0 (none) first, each with ``pages[window]`` pages.

    Args:
        pages: of each pool.
        page_length: positions of a page.
        chunk: new tokens of a row in one call, at most; 0: any number, and rows are promised all of their
            pages in every pool.
    """

    def __init__(self, pages: Mapping[int, int], page_length: int = PAGE_LENGTH, chunk: int = 0) -> None:
        self._pools = {
            window: PagePool(pages[window], page_length, span(window, chunk)) for window in sorted(pages)
        }

    @property
    def whole(self) -> PagePool:
        """The pool of the layers without a window."""
        return self._pools[0]

    @property
    def pools(self) -> Mapping[int, PagePool]:
        """By window."""
        return self._pools

    @property
    def has_windows(self) -> bool:
        """Whether there is more than the first pool."""
        return len(self._pools) > 1

    def held(self) -> dict[int, int]:
        """Pages of each pool that rows hold or that are retained."""
        return {window: pool.held for window, pool in self._pools.items()}

    def missing(self, row: int, tokens: int) -> dict[int, int]:
        """Pages of each pool that are lacking for a promise; those that lack none are left out."""
        lacking = {window: pool.missing(row, tokens) for window, pool in self._pools.items()}
        return {window: pages for window, pages in lacking.items() if pages}

    def promise(self, row: int, tokens: int) -> bool:
        """Promise a row pages for ``tokens`` in all; if they are not there in every pool nothing changes."""
        if self.missing(row, tokens):
            return False
        for pool in self._pools.values():
            pool.promise(row, tokens)
        return True

    def extend(self, row: int, past: int, tokens: int) -> None:
        """Take pages for a row's positions ``past`` … ``tokens`` - 1, and give back what those do not see."""
        for window, pool in self._pools.items():
            if window:
                pool.slide(row, max(0, past - window + 1))
            pool.extend(row, tokens)

    def release(self, row: int) -> None:
        """Give back what a row holds and was promised."""
        for pool in self._pools.values():
            pool.release(row)

    def untouched_after(self, row: int, tokens: int) -> dict[int, int]:
        """Pages of each pool never touched so far that rows would hold at worst after this promise."""
        return {window: pool.untouched_after(row, tokens) for window, pool in self._pools.items()}

    def tables(self, rows: Sequence[int]) -> dict[str, NDArray[np.int32]]:
        """The page tables of these rows by name of the graph's input, int32 [B, M]."""
        return {page_table(window): pool.table(rows) for window, pool in self._pools.items()}

    def stacks_of(self, row: int) -> list[Stack]:
        """What a row holds, in the order of its positions."""
        return list(zip(*(pool.pages_of(row) for pool in self._pools.values()), strict=True))

    def holds_view(self, stacks: Sequence[Stack], tokens: int) -> bool:
        """Whether stacks that held the first ``tokens`` of a text still hold what its next token sees."""
        return all(
            stack[at] >= 0
            for at, window in enumerate(self._pools)
            if window
            for stack in stacks[self._first_seen(window, tokens) :]
        )

    def view(self, stacks: Sequence[Stack], tokens: int) -> list[Stack]:
        """The same stacks with the pages alone that this token sees."""
        first = [self._first_seen(window, tokens) if window else 0 for window in self._pools]
        return [
            tuple(page if place >= start else -1 for page, start in zip(stack, first, strict=True))
            for place, stack in enumerate(stacks)
        ]

    def _first_seen(self, window: int, tokens: int) -> int:
        """The place of the first page that a token after ``tokens`` others sees."""
        return max(0, tokens - window + 1) // self.whole.page_length

    def adopt(self, row: int, stacks: Sequence[Stack]) -> None:
        """Begin a new row with whole pages that are held or retained."""
        for at, pool in enumerate(self._pools.values()):
            pool.adopt(row, [stack[at] for stack in stacks])

    def retain(self, stacks: Iterable[Stack]) -> None:
        """Keep pages that are not free when their rows end."""
        for stack in stacks:
            for page, pool in zip(stack, self._pools.values(), strict=True):
                if page >= 0:
                    pool.retain([page])

    def forget(self, stacks: Iterable[Stack]) -> None:
        """Keep pages no longer, once for each time that they were retained."""
        for stack in stacks:
            for page, pool in zip(stack, self._pools.values(), strict=True):
                if page >= 0:
                    pool.forget([page])

    def references(self, stack: Stack) -> int:
        """Rows that hold any page of a stack, and the times that it is retained."""
        return max(
            pool.references(page) for page, pool in zip(stack, self._pools.values(), strict=True) if page >= 0
        )

    def strip(self, stack: Stack, windows: Collection[int]) -> tuple[Stack, list[int]]:
        """Of a retained stack forget the pages of these windows that no row holds: what is left, and the
        windows whose pages went."""
        gone = []
        left = list(stack)
        for at, (window, pool) in enumerate(self._pools.items()):
            if window in windows and stack[at] >= 0 and pool.references(stack[at]) == 1:
                pool.forget([stack[at]])
                left[at] = -1
                gone.append(window)
        return tuple(left), gone

    def completed(self, stack: Stack, other: Stack) -> Stack:
        """A retained stack with the pages that it lacks from another one of the same tokens, retained too."""
        added = tuple(b if a < 0 else -1 for a, b in zip(stack, other, strict=True))
        self.retain([added])
        return tuple(b if a < 0 else a for a, b in zip(stack, other, strict=True))


def span(window: int, chunk: int) -> int:
    """Positions of a window that a row holds at most at one time: those that the first token of a call sees,
    and the call's; 0: all."""
    return window - 1 + chunk if window and chunk else 0


@dataclass(frozen=True)
class PoolBytes:
    """What pools take.

    Attributes:
        page: bytes of a page in each pool, by window; 0, for none, is the first.
        page_length: positions of a page.
        chunk: new tokens of a row in one call, at most; 0: any number.
    """

    page: Mapping[int, int]
    page_length: int
    chunk: int

    def sizes(self, pages: int, rows: int) -> dict[int, int]:
        """Pages of each pool, for windows of ``rows`` rows that have ``pages`` of the first pool together."""
        sizes = {}
        for window in self.page:
            held = PagePool(0, self.page_length, span(window, self.chunk)).most(pages * self.page_length)
            sizes[window] = min(pages, rows * held)
        return sizes

    def of(self, pages: Mapping[int, int]) -> int:
        """Bytes of so many pages of each pool."""
        return sum(self.page[window] * count for window, count in pages.items())

    def sizes_within(self, size: int, pages: int, rows: int) -> dict[int, int]:
        """The same for as many of these rows as fit in ``size`` bytes, at least one."""
        low, high = 1, max(rows, 1)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.of(self.sizes(pages, middle)) <= size
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.sizes(pages, low)

    def most_pages(self, size: int, rows: int) -> int:
        """The most pages of the first pool that fit in ``size`` bytes beside the windows of ``rows`` rows."""
        low, high = 0, size // self.page[0] if self.page[0] else MOST_TOKENS // self.page_length
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.of(self.sizes(middle, rows)) <= size
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
