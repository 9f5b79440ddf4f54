"""Pages: none in two rows unless shared, none lost, and a promise is kept whole or not made."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chai_export.runtime.pages import PagePool

TABLE = json.loads((Path(__file__).parents[1] / "data/paging_cases.json").read_text())
ROWS = st.integers(0, 5)
TOKENS = st.integers(1, 40)


class AnyOrder(RuleBasedStateMachine):
    """A pool against what each row was promised and has taken, in pages."""

    @initialize(pages=st.integers(1, 12), length=st.integers(1, 5))
    def begin(self, pages, length):
        self.pool = PagePool(pages, length)
        self.promised: dict[int, int] = {}
        self.taken: dict[int, tuple[int, ...]] = {}
        self.most_held = 0

    def pages(self, tokens: int) -> int:
        return (tokens + self.pool.page_length - 1) // self.pool.page_length

    def distinct(self) -> int:
        return len({page for pages in self.taken.values() for page in pages})

    @rule(row=ROWS, tokens=TOKENS)
    def promise(self, row, tokens):
        others = sum(self.promised[r] - len(self.taken[r]) for r in self.promised if r != row)
        own = max(self.pages(tokens), self.promised.get(row, 0)) - len(self.taken.get(row, ()))
        fits = self.distinct() + others + own <= self.pool.pages
        before = dict(self.pool.__dict__, _rows=str(self.pool._rows), _returned=list(self.pool._returned))
        assert self.pool.promise(row, tokens) == fits
        if fits:
            self.promised[row] = max(self.pages(tokens), self.promised.get(row, 0))
            self.taken.setdefault(row, ())
        else:
            after = dict(self.pool.__dict__, _rows=str(self.pool._rows), _returned=list(self.pool._returned))
            assert after == before

    @precondition(lambda self: self.promised)
    @rule(data=st.data())
    def extend(self, data):
        row = data.draw(st.sampled_from(sorted(self.promised)))
        tokens = data.draw(st.integers(0, self.promised[row] * self.pool.page_length))
        self.pool.extend(row, tokens)
        pages = self.pool.pages_of(row)
        assert pages[: len(self.taken[row])] == self.taken[row]
        assert len(pages) == max(self.pages(tokens), len(self.taken[row]))
        self.taken[row] = pages

    @precondition(lambda self: self.promised)
    @rule(data=st.data(), row=ROWS, tokens=TOKENS)
    def share(self, data, row, tokens):
        source = data.draw(st.sampled_from(sorted(self.promised)))
        if row in self.promised:
            return
        shared = self.pool.share(row, source, tokens)
        assert shared <= tokens
        assert shared % self.pool.page_length == 0
        self.taken[row] = self.taken[source][: tokens // self.pool.page_length]
        self.promised[row] = len(self.taken[row])
        assert self.pool.pages_of(row) == self.taken[row]
        assert shared == len(self.taken[row]) * self.pool.page_length

    @precondition(lambda self: self.promised)
    @rule(data=st.data())
    def release(self, data):
        row = data.draw(st.sampled_from(sorted(self.promised)))
        self.pool.release(row)
        del self.promised[row], self.taken[row]

    @invariant()
    def every_page_is_free_or_held_and_never_both(self):
        held = Counter(page for pages in self.taken.values() for page in pages)
        assert sorted([*self.pool._returned, *held]) == list(range(self.pool.touched))
        assert all(self.pool.references(page) == held[page] for page in range(self.pool.pages))
        assert self.pool.held == len(held)

    @invariant()
    def promises_can_be_kept(self):
        outstanding = sum(self.promised[row] - len(self.taken[row]) for row in self.promised)
        assert self.pool.outstanding == outstanding <= self.pool.free

    @invariant()
    def touched_pages_are_the_first_ones(self):
        held = {page for pages in self.taken.values() for page in pages}
        self.most_held = max(self.most_held, len(held))
        assert self.pool.peak == self.most_held
        # A page is touched only when no touched one is free, so no more are than were ever held at once.
        assert all(page < self.pool.touched for page in held)
        assert self.pool.touched == self.most_held


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_a_row_cannot_outgrow_its_promise():
    pool = PagePool(4, 8)
    assert pool.promise(0, 16)
    with pytest.raises(AssertionError, match="past its promise"):
        pool.extend(0, 17)


@pytest.mark.parametrize("case", TABLE["pools"], ids=lambda case: case["name"])
def test_pools_do_what_the_table_says(case):
    pool = PagePool(case["pages"], case["page_length"])
    for step in case["steps"]:
        row, tokens = step["row"], step.get("tokens", 0)
        if step["do"] == "promise":
            assert pool.promise(row, tokens) == step["made"], step
        elif step["do"] == "extend":
            pool.extend(row, tokens)
        elif step["do"] == "share":
            assert pool.share(row, step["source"], tokens) == step["shared"], step
        else:
            pool.release(row)
        if "pages" in step:
            assert list(pool.pages_of(row)) == step["pages"], step
    found = {name: getattr(pool, name) for name in ("held", "outstanding", "touched", "peak")}
    assert found == {name: case[name] for name in found}


def test_tables_name_pages_in_the_order_of_positions():
    pool = PagePool(6, 4)
    for row, tokens in ((7, 4), (2, 12)):
        assert pool.promise(row, tokens)
        pool.extend(row, tokens)
    table = pool.table([2, 7])
    assert table.dtype == np.int32
    assert table.tolist() == [[1, 2, 3], [0, -1, -1]]
    pool.release(7)
    assert pool.promise(2, 16)
    pool.extend(2, 13)
    assert pool.table([2]).tolist() == [[1, 2, 3, 0]]


def test_memory_that_was_touched_is_taken_first():
    pool = PagePool(10, 4)
    assert pool.promise(0, 12)
    assert pool.untouched_after(1, 8) == 5
    pool.extend(0, 12)
    pool.release(0)
    assert pool.untouched_after(1, 8) == 0
    assert pool.untouched_after(1, 20) == 2
    assert pool.promise(1, 8)
    assert pool.untouched_after(2, 8) == 1


def test_retained_pages_outlive_their_row_and_are_adopted():
    pool = PagePool(5, 4)
    assert pool.promise(0, 10)
    pool.extend(0, 10)
    pool.retain([0, 1])
    pool.release(0)
    assert (pool.held, pool.outstanding) == (2, 0)
    assert [pool.references(page) for page in range(5)] == [1, 1, 0, 0, 0]
    pool.adopt(3, [0, 1])
    assert pool.missing(3, 17) == 0
    assert pool.promise(3, 17)
    assert pool.missing(4, 4) == 1  # of three free pages three are promised
    assert not pool.promise(4, 1)
    pool.extend(3, 17)
    assert pool.pages_of(3) == (0, 1, 2, 3, 4)
    pool.forget([0, 1])
    assert pool.held == 5
    pool.release(3)
    assert pool.held == 0
    assert pool.promise(4, 20)
    pool.extend(4, 20)
    assert sorted(pool.pages_of(4)) == [0, 1, 2, 3, 4]


def test_a_free_page_cannot_be_retained():
    pool = PagePool(2, 4)
    with pytest.raises(AssertionError, match="nothing to keep"):
        pool.retain([0])
