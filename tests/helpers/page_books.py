"""A session that only keeps books: it stores tokens in pages, and finds out who reads what was not stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chai_export.runtime.cache import Budget
from chai_export.runtime.pages import PagePool
from chai_export.runtime.row_pages import RowPages, Stack

VOCABULARY = 11
END = 7
PROBE = 3


def next_token(ids: Sequence[int]) -> int:
    """The model: depends on every token and their number."""
    return (sum((i + 1) * token for i, token in enumerate(ids)) + len(ids)) % VOCABULARY


def text_of(prompt: Sequence[int], new: int, positions: int, *, ends: bool = True) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + new and len(ids) <= positions:
        ids.append(next_token(ids))
        if ends and ids[-1] == END:
            break
    return ids[len(prompt) :]


class Books:
    """A session that stores tokens in pages, and checks that each call reads what was stored."""

    in_place = bounded_scratch = True
    capacity = cache_bytes = 0

    def __init__(self, pages: int, page_length: int) -> None:
        self.most_pages = pages
        self.page_length = page_length
        self.calls: list[tuple[int, int]] = []
        self.admitted: list[int] = []
        self.withheld = 0
        self.switches: tuple[int, ...] = ()

    def budget(self, rows: int = 1, chunk: int = 0) -> tuple[int, Budget]:
        return self.most_pages * self.page_length, Budget(0, "raise --cache-memory")

    def drop(self) -> None:
        self.calls.clear()

    def start(self, rows: int, pages: int, chunk: int = 0, windows: int | None = None) -> None:
        self.pages = RowPages({0: pages}, self.page_length)
        self.memory = np.full((pages, self.page_length), -1)
        self.head_map = np.zeros((1, rows, 1), np.int32)

    def begin(self, batch: int, capacity: int) -> None:
        raise NotImplementedError

    @property
    def pool(self) -> PagePool:
        return self.pages.whole

    @property
    def held_tokens(self) -> dict[int, int]:
        return {0: self.pool.peak * self.page_length}

    def promise(self, row: int, tokens: int) -> bool:
        if self.withheld and tokens > self.withheld:
            return False
        promised = self.pool.promise(row, tokens)
        if promised:
            self.admitted.append(tokens)
        return promised

    def release(self, row: int) -> None:
        pages = self.pool.pages_of(row)
        self.pool.release(row)
        for page in pages:
            if not self.pool.references(page):
                self.memory[page] = -1  # whoever reads it afterwards is found out

    def adopt(self, row: int, stacks: Sequence[Stack], head_map: Any) -> None:
        self.pages.adopt(row, stacks)
        self.head_map[:, row] = head_map

    def copy_page(self, stack: Stack, row: int, tokens: int) -> None:
        (page,) = stack
        self.pool.extend(row, tokens)
        used = (tokens - 1) % self.page_length + 1
        self.memory[self.pool.pages_of(row)[-1], :used] = self.memory[page, :used]

    def step(
        self, input_ids: Any, lengths: Any, past_lengths: Any, output_positions: Any, rope: Any, rows: Any
    ) -> Any:
        self.calls.append(input_ids.shape)
        assert len(set(rows)) == len(rows)
        assert input_ids.shape[1] == max(lengths)
        logits = np.zeros((*output_positions.shape, VOCABULARY), np.float32)
        for line, row in enumerate(rows):
            past, new = int(past_lengths[line]), int(lengths[line])
            assert new > 0
            assert past == 0 or past >= PROBE
            assert past > 0 or new >= min(PROBE, rope[line])
            assert rope[line] >= past + new
            self.pool.extend(row, past + new)
            pages = self.pool.pages_of(row)
            side = self.side(rope[line])
            for i in range(new):
                page, offset = divmod(past + i, self.page_length)
                assert self.pool.references(pages[page]) == 1, "another row reads this page"
                self.memory[pages[page], offset] = input_ids[line, i] + VOCABULARY * side
            stored = self.memory[list(pages)].ravel()[: past + new]
            assert (stored // VOCABULARY == side).all(), "never written, or rotated for another length"
            ids = (stored % VOCABULARY).tolist()
            map_of_text = 1 + next_token(ids[:PROBE])
            if past == 0:
                self.head_map[:, row] = map_of_text
            assert (self.head_map[:, row] == map_of_text).all()
            for place, position in enumerate(output_positions[line]):
                assert position < new
                logits[line, place, next_token(ids[: past + position + 1])] = 1
        return logits

    def side(self, tokens: int) -> int:
        """Which rotary factors a text of so many tokens has."""
        return sum(tokens > length for length in self.switches)
