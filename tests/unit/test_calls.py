"""Rows are divided into the calls that compute least."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chai_export.runtime.calls import CALL_TOKENS, plan_calls


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


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([1, 1, 512, 1], [[0, 1, 3], [2]]),
        ([1] * 8, [list(range(8))]),
        ([3, 1, 2], [[0, 1, 2]]),
        ([512, 60, 1, 512, 1], [[2, 4], [1], [0, 3]]),
        ([7], [[0]]),
    ],
)
def test_decoders_do_not_pay_for_a_prompt(lengths, calls):
    assert plan_calls(lengths) == calls
