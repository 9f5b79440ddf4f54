"""The server's loop against a session that only keeps books: whatever comes, whatever room there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chai_export.errors import ChaiError
from chai_export.runtime.request import Limits, Request
from chai_export.runtime.sampling import Sampler, SamplingSettings
from chai_export.runtime.stopping import StopReason, StopStrings
from chai_export.serve import batch as batch_module
from chai_export.serve.batch import Batch, Shape
from chai_export.serve.job import End, Job, Piece
from tests.helpers.page_books import END, PROBE, VOCABULARY, Books, next_token, text_of

POSITIONS = 40


class Client:
    """A job and what its listener was told."""

    def __init__(
        self, prompt: Sequence[int], new: int, switches: Sequence[int] = (), ends: bool = True, **options: Any
    ) -> None:
        self.ends = ends
        limits = Limits(new, POSITIONS, {END} if ends else (), switches)
        request = Request(0, list(prompt), limits, Sampler(SamplingSettings()), StopStrings(()), None)
        self.prompt, self.new = list(prompt), new
        self.pieces: list[Piece] = []
        self.end: End | None = None
        self.job = Job(request, self.listen, **options)

    def listen(self, event: Piece | End) -> None:
        assert self.end is None
        if isinstance(event, Piece):
            self.pieces.append(event)
        else:
            self.end = event

    @property
    def tokens(self) -> list[int]:
        return [piece.token for piece in self.pieces]

    @property
    def alone(self) -> list[int]:
        return text_of(self.prompt, self.new, POSITIONS, ends=self.ends)


def batch_of(session: Books, rows: int, **options: Any) -> Batch:
    shape = Shape(PROBE, query_heads=1, vocab=VOCABULARY, switch_lengths=session.switches)
    return Batch(session, shape, rows=rows, pages=session.most_pages, **options)


def run(batch: Batch, most_steps: int = 10_000) -> None:
    for _ in range(most_steps):
        if not batch.busy:
            return
        batch.step()
    raise AssertionError("it does not end")


def assert_nothing_is_lost(batch: Batch, session: Books) -> None:
    _, held, kept = batch.pages
    assert held == kept
    assert session.pool.outstanding == 0
    batch.forget_prefixes()
    assert session.pool.held == 0


PROMPT = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
    # Beginnings that texts have in common.
    st.tuples(st.integers(0, 30), st.lists(st.integers(0, VOCABULARY - 1), max_size=4)).map(
        lambda parts: [1, *[(7 * i) % 6 for i in range(parts[0])], *parts[1]][:30]
    ),
)
ARRIVALS = st.lists(
    st.tuples(PROMPT, st.integers(1, 25), st.integers(0, 30), st.one_of(st.none(), st.integers(0, 20))),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=ARRIVALS,
    rows=st.integers(1, 5),
    page_length=st.integers(1, 9),
    spare=st.integers(0, 30),
    chunk=st.integers(1, 12),
    switches=st.lists(st.integers(1, 40), max_size=2, unique=True).map(sorted),
    reuse=st.booleans(),
)
def test_every_text_is_what_it_is_alone(arrivals, rows, page_length, spare, chunk, switches, reuse):
    """Texts come at any step, some leave at any step, and some want their prompts scored."""
    session = Books(-(-POSITIONS // page_length) + spare, page_length)
    session.switches = tuple(switches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "PREFILL_TOKENS", chunk)
        batch = batch_of(session, rows, reuse=reuse)
        clients = []
        for number, (prompt, new, at, leaves) in enumerate(arrivals):
            scored = {"top": 1, "score_prompt": True} if number % 3 == 2 else {}
            clients.append((Client(prompt, new, switches, **scored), at, leaves))
        for step in range(55):
            for client, at, leaves in clients:
                if step == at:
                    batch.add(client.job)
                if leaves is not None and step == at + leaves:
                    batch.abort(client.job)
            batch.step()
        run(batch)
    for client, _, leaves in clients:
        assert client.end is not None
        assert client.end.error is None
        if client.end.reason is None:
            assert leaves is not None
            assert client.tokens == client.alone[: len(client.tokens)]
        else:
            assert client.tokens == client.alone
            scores = client.job.prompt_scores
            if client.job._top is not None:
                ids = client.prompt
                assert scores[0] is None
                found = [(score.token, score.top[0][0]) for score in scores[1:]]
                assert found == [(ids[i], next_token(ids[:i])) for i in range(1, len(ids))]
    assert max((rows for rows, _ in session.calls), default=0) <= rows
    assert_nothing_is_lost(batch, session)


def test_a_long_prompt_does_not_delay_a_text_by_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(batch_module, "PREFILL_TOKENS", 4)
    session = Books(30, 4)
    batch = batch_of(session, 2)
    short = Client([2, 4, 1], 8, ends=False)
    batch.add(short.job)
    batch.step()
    long = Client([1] * 33, 2, ends=False)
    batch.add(long.job)
    while short.end is None:
        made = len(short.pieces)
        batch.step()
        assert len(short.pieces) == made + 1
    assert not long.pieces
    assert max(rows * tokens for rows, tokens in session.calls) <= 8
    run(batch)
    assert long.tokens == long.alone


def test_prompts_that_come_together_share_a_step(monkeypatch):
    """A short prompt behind a long one has its first token before that is through."""
    monkeypatch.setattr(batch_module, "PREFILL_TOKENS", 8)
    session = Books(30, 4)
    batch = batch_of(session, 2)
    long, short = Client([1] * 33, 2), Client([2] * 8, 2)
    batch.add(long.job)
    batch.add(short.job)
    batch.step()
    batch.step()
    assert short.pieces
    assert not long.pieces


def test_the_youngest_gives_way_and_goes_on_with_what_it_had():
    session = Books(10, 4)
    batch = batch_of(session, 3)
    clients = [Client([1, 2, 3 + i, 4, 0, 1, 1], 30, ends=False) for i in range(3)]
    for client in clients:
        batch.add(client.job)
    run(batch)
    assert [client.tokens for client in clients] == [client.alone for client in clients]
    assert batch.counts.preempted > 0
    assert_nothing_is_lost(batch, session)


def test_the_beginning_of_an_earlier_text_is_not_computed_again():
    session = Books(40, 4)
    batch = batch_of(session, 2)
    first = Client([1, 2, 3, 4, 5, 6, 5, 4, 3], 4)
    batch.add(first.job)
    run(batch)
    session.calls.clear()
    again = Client(first.prompt + first.tokens[:-1] + [9, 9], 3)
    batch.add(again.job)
    run(batch)
    assert again.tokens == again.alone
    held = len(first.prompt) + len(first.tokens) - 1
    assert again.job.reused_tokens == held
    assert session.calls[0] == (1, len(again.prompt) - held)
    assert batch.counts.reused_tokens == held


def test_texts_that_begin_alike_and_come_together_are_computed_once(monkeypatch):
    monkeypatch.setattr(batch_module, "PREFILL_TOKENS", 8)
    session = Books(40, 4)
    batch = batch_of(session, 4)
    clients = [Client([1, 2, 3, 4] * 5 + [i], 3) for i in range(4)]
    for client in clients:
        batch.add(client.job)
    run(batch)
    assert [client.tokens for client in clients] == [client.alone for client in clients]
    assert [client.job.reused_tokens for client in clients] == [0, 20, 20, 20]


def test_a_beginning_shorter_than_the_probe_is_not_taken_over():
    session = Books(40, 1)
    batch = batch_of(session, 1)
    for prompt, reused in (([1, 2, 9, 9], 0), ([1, 2, 8, 8], 0), ([1, 2, 8, 9], 3)):
        client = Client(prompt, 2)
        batch.add(client.job)
        run(batch)
        assert client.tokens == client.alone
        assert client.job.reused_tokens == reused


def test_least_recently_used_beginnings_go_first():
    session = Books(11, 4)
    batch = batch_of(session, 1)

    def reused(prompt: list[int]) -> int | None:
        client = Client(prompt, 1)
        batch.add(client.job)
        run(batch)
        assert client.tokens == client.alone
        return client.job.reused_tokens

    texts = [[i] * 12 for i in (1, 2, 3)]
    assert [reused(text) for text in texts] == [0, 0, 0]
    assert reused(texts[0]) == 11
    assert reused([4] * 12) == 0  # takes the two free pages and one of the second text
    assert reused(texts[0]) == 11
    assert reused(texts[2]) == 11
    assert reused(texts[1]) == 4  # the copy of a page in part took another


class Failing(Books):
    """Fails at calls with a row whose text holds the token."""

    bad = 10

    def step(self, input_ids: Any, *arguments: Any) -> Any:
        if (input_ids == self.bad).any():
            raise RuntimeError("the graph broke")
        return super().step(input_ids, *arguments)


def test_a_call_that_fails_ends_the_texts_in_it_and_no_others(capsys):
    session = Failing(40, 4)
    batch = batch_of(session, 4)
    good = Client([1, 2, 3], 12)
    assert Failing.bad not in good.alone
    batch.add(good.job)
    batch.step()
    bad, beside = Client([10] * 30, 12), Client([6] * 30, 3)
    batch.add(bad.job)
    batch.add(beside.job)
    batch.step()
    for client in (bad, beside):
        assert client.end is not None
        assert "the graph broke" in str(client.end.error)
    assert good.end is None
    assert "the graph broke" in capsys.readouterr().err
    session.bad = -1
    later = Client([10] * 30, 12)
    batch.add(later.job)
    run(batch)
    assert (good.tokens, later.tokens) == (good.alone, later.alone)
    assert later.job.reused_tokens == 0  # nothing of a failed text is kept
    assert batch.counts.failed == 2
    assert_nothing_is_lost(batch, session)


def test_a_listener_or_sampler_that_fails_ends_its_own_text(monkeypatch):
    session = Books(40, 4)
    batch = batch_of(session, 2)
    good, bad = Client([1, 2, 3], 5), Client([1, 2, 4], 5)
    monkeypatch.setattr(bad.job.request.sampler, "choose", lambda *_: 1 // 0)
    batch.add(good.job)
    batch.add(bad.job)
    run(batch)
    assert good.tokens == good.alone
    assert bad.end is not None
    assert isinstance(bad.end.error, ChaiError)
    assert_nothing_is_lost(batch, session)


def test_memory_that_is_gone_ends_a_text_that_waits_for_nothing():
    session = Books(40, 4)
    batch = batch_of(session, 2)
    session.withheld = 3
    client = Client([1, 2, 3, 4], 5)
    batch.add(client.job)
    run(batch)
    assert client.end is not None
    assert "4 tokens has no memory left" in str(client.end.error)
    session.withheld = 0
    again = Client([1, 2, 3, 4], 5)
    batch.add(again.job)
    run(batch)
    assert again.tokens == again.alone
    assert again.end == End(again.job.request.stop_reason)
    assert again.job.request.stop_reason in (StopReason.LENGTH, StopReason.EOS)


def test_scores_are_those_of_the_distribution():
    from chai_export.serve.logprobs import score

    logits = np.log(np.array([1, 4, 4, 1, 2], np.float32) / 12)
    found = score(logits, 3, 3)
    assert found.logprob == pytest.approx(np.log(1 / 12), abs=1e-6)
    assert [token for token, _ in found.top] == [1, 2, 4]
    assert found.top[0][1] == pytest.approx(np.log(4 / 12), abs=1e-6)
    assert score(logits, 0, 0).top == ()
    assert len(score(logits, 0, 99).top) == 5
