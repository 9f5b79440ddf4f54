"""The generation loop against a session that only keeps books: any prompts, any pool, the same texts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chai_export.errors import ChaiError
from chai_export.runtime.request import Limits, Request
from chai_export.runtime.sampling import Sampler, SamplingSettings
from chai_export.runtime.scheduler import Scheduler
from chai_export.runtime.stopping import StopStrings
from tests.helpers.page_books import END, PROBE, VOCABULARY, Books, text_of


def requests_of(
    prompts: Sequence[Sequence[int]], new: Sequence[int], positions: int, switches: Sequence[int] = ()
) -> list[Request]:
    return [
        Request(
            index,
            list(prompt),
            Limits(count, positions, {END}, switches),
            Sampler(SamplingSettings()),
            StopStrings(()),
            None,
        )
        for index, (prompt, count) in enumerate(zip(prompts, new, strict=True))
    ]


PROMPT = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)
TEXTS = st.lists(st.tuples(PROMPT, st.integers(1, 25)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    texts=TEXTS,
    slots=st.integers(1, 5),
    page_length=st.integers(1, 9),
    spare=st.integers(0, 40),
    chunk=st.integers(1, 12),
    switches=st.lists(st.integers(1, 40), max_size=2),
)
def test_every_text_is_what_it_is_alone_whatever_room_there_is(
    texts, slots, page_length, spare, chunk, switches
):
    """``spare`` pages beyond what the longest text needs."""
    prompts, new = zip(*texts, strict=True)
    positions = 40
    requests = requests_of(prompts, new, positions, switches)
    needed = [-(-request.most_tokens // page_length) for request in requests]
    session = Books(max(needed) + spare, page_length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chai_export.runtime.scheduler.LONGEST_CHUNK", chunk)
        Scheduler(session, slots=slots, query_heads=1, probe_tokens=PROBE).run(requests)
    for request, prompt, count in zip(requests, prompts, new, strict=True):
        assert request.new_ids == text_of(prompt, count, positions)
        assert request.stop_reason is not None
    assert session.admitted == [request.most_tokens for request in requests]
    assert (session.pool.held, session.pool.outstanding) == (0, 0)
    assert session.pool.pages == min(sum(sorted(needed)[::-1][:slots]), max(needed) + spare)
    assert max(rows for rows, _ in session.calls) <= slots


def test_one_that_waits_is_not_overtaken():
    """The second text does not fit beside the first; the third would."""
    session = Books(6, 4)
    prompts = [[1, 1, 1, 1], [2] * 16, [3, 3, 3]]
    requests = requests_of(prompts, [5, 5, 1], 99)
    Scheduler(session, slots=3, query_heads=1, probe_tokens=PROBE).run(requests)
    assert session.admitted == [8, 20, 3]
    assert session.calls[0] == (1, 4)
    assert all(request.new_ids for request in requests)


def test_memory_that_is_gone_is_an_error_when_nothing_runs_that_would_free_it():
    session = Books(6, 4)
    session.withheld = 10
    requests = requests_of([[1, 1, 1], [2] * 16], [4, 5], 99)
    with pytest.raises(ChaiError, match=r"a row of 20 tokens has no memory left.*raise --cache-memory"):
        Scheduler(session, slots=2, query_heads=1, probe_tokens=PROBE).run(requests)
    assert requests[0].stop_reason is not None
