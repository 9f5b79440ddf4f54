"""Rows are divided into the calls that compute least."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chai_export.runtime.calls import CALL_TOKENS, plan_calls

TABLE = json.loads((Path(__file__).parents[1] / "data/paging_cases.json").read_text())


def cost(lengths: list[int], calls: list[list[int]]) -> int:
    return sum(len(call) * max(lengths[row] for row in call) + CALL_TOKENS for call in calls)


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    """Every way to divide rows, whatever their order."""
    if not rows:
        yield []
        return
    for rest in partitions(rows[1:]):
        yield [[rows[0]], *rest]
        for index, call in enumerate(rest):
            yield [*rest[:index], [rows[0], *call], *rest[index + 1 :]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_no_division_costs_less(lengths):
    calls = plan_calls(lengths)
    assert sorted(row for call in calls for row in call) == list(range(len(lengths)))
    assert all(call == sorted(call) for call in calls)
    assert cost(lengths, calls) == min(cost(lengths, p) for p in partitions(list(range(len(lengths)))))


@pytest.mark.parametrize("case", TABLE["calls"], ids=lambda case: str(case["lengths"]))
def test_calls_are_those_of_the_table(case):
    assert plan_calls(case["lengths"]) == case["calls"]
