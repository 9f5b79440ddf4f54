"""The rows of a running server, step by step; knows nothing of threads or networks.

1. *Admission.* In the order of arrival a text gets a free row, with the longest beginning that earlier texts
   left in the cache, once there are pages for the rest of what it has to feed. If not, it waits, and those
   behind it. A text that begins as a prompt which is being computed waits for that, and takes it over.
2. *Step.* Every decoding row feeds one token. Rows in their prompts share :data:`PREFILL_TOKENS`, so that a
   step takes a bounded time however long a prompt is.
3. *Pages.* A row takes a page when its text reaches it. If none is free, beginnings that no row uses go,
   least recently used first; then the youngest text gives up its row, waits, and is computed anew later. The
   oldest always goes on, so all of them end.
4. *End.* The pages of a text that has ended stay as a beginning for others, until they are needed.

A call that fails ends the texts in it and no others.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from chai_export.errors import ChaiError, reason
from chai_export.progress import note
from chai_export.runtime.calls import plan_calls
from chai_export.runtime.likeliest import step_rows
from chai_export.runtime.scheduler import chunk_length, longest_call
from chai_export.runtime.session import SharingSession
from chai_export.serve.job import End, Job
from chai_export.serve.prefixes import Prefix, PrefixTree

PREFILL_TOKENS = 256
"""Tokens of prompts in one step, over all rows that are in their prompts."""

KEPT_WINDOWS = 2
"""Windows that have room in the layers with one, for each row: its own, and one of a text that has ended."""

_SCORED = 1 << 24
"""Logits of prompt tokens that one call may make: 64 MiB."""


@dataclass
class Counts:
    """What happened since the server began."""

    texts: int = 0
    failed: int = 0
    aborted: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Shape:
    """What the loop has to know of a model; ``vocab`` and ``query_heads`` bound the memory of a call."""

    probe_tokens: int
    query_heads: int
    vocab: int
    switch_lengths: Sequence[int] = ()

    def side(self, tokens: int) -> int:
        """Which rotary factors a text of so many tokens has."""
        return sum(tokens > length for length in self.switch_lengths)


@dataclass(frozen=True)
class _Window:
    """Positions ``start`` … ``end`` - 1 of a job, to be fed."""

    job: Job
    start: int
    end: int


class Batch:
    """Texts on at most ``rows`` rows and ``pages`` pages of a session, which nobody else uses.

    Args:
        session: whose pool is begun anew.
        shape: of its model.
        rows: texts computed at one time.
        pages: of the pool; one text with the largest limits fits.
        ended: called with each job that has ended, after its listener.
        reuse: keep beginnings of texts for others.
    """

    def __init__(
        self,
        session: SharingSession,
        shape: Shape,
        *,
        rows: int,
        pages: int,
        ended: Callable[[Job], None] = lambda job: None,
        reuse: bool = True,
    ) -> None:
        self._session = session
        self._shape = shape
        self._rows = rows
        self._pages = pages
        self._ended = ended
        self._reuse = reuse
        self._numbers = count()
        self.counts = Counts()
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self._begin_anew()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    @property
    def pages(self) -> tuple[int, int, int]:
        """Pages of the pool, those that are not free, and those of them that are kept for texts to come."""
        return self._pages, self._session.pool.held, self._tree.pages

    def add(self, job: Job) -> None:
        """Let a job wait for its turn."""
        job.number = next(self._numbers)
        self.waiting.append(job)

    def abort(self, job: Job) -> None:
        """End a job, if it has not ended."""
        if job.end is None:
            self.counts.aborted += 1
            self._finish(job, End())

    def fail_all(self, error: Exception) -> None:
        """End every job with ``error``, and begin anew with an empty pool."""
        jobs = [*self.running, *self.waiting]
        self.running, self.waiting = [], []
        self._begin_anew()
        for job in jobs:
            job.row = None
            self._tell(job, self._failure(error))

    def step(self) -> None:
        """Admit what can be admitted, and feed every row."""
        self._admit()
        windows = self._windows()
        scoring = [window for window in windows if window.job.scores_prompt_now]
        for window in scoring:
            self._call([window])
        others = [window for window in windows if window not in scoring]
        for call in plan_calls([window.end - window.start for window in others]):
            self._call([others[i] for i in call])

    def forget_prefixes(self) -> None:
        """Give back the pages that are kept for texts to come."""
        self._tree.clear()

    # Admission

    def _begin_anew(self) -> None:
        longest = longest_call(self._shape.probe_tokens)
        self._session.start(self._rows, self._pages, longest, KEPT_WINDOWS * self._rows)
        self._tree = PrefixTree(self._session.pages, self._shape.probe_tokens)
        self._no_map = np.zeros_like(self._session.head_map[:, 0])
        self._free = list(range(self._rows))[::-1]

    def _admit(self) -> None:
        for job in self.waiting.copy():
            if not self._free:
                return
            try:
                admitted = self._begin(job)
            except Exception as error:  # memory that the system refuses, for one
                self._finish(job, self._failure(error), keep=False)
                continue
            if admitted is None:
                continue
            if not admitted:
                if self.running:
                    return
                self._finish(job, self._failure(self._no_memory(job)), keep=False)

    def _begin(self, job: Job) -> bool | None:
        """Give a job a row; False if there are no pages, None if what it begins with is being computed."""
        ids, side = job.request.ids, self._shape.side(len(job.request.ids))
        prefix = None if not self._reuse or job.scores_prompt_now else self._tree.find(ids, side)
        found = prefix.tokens if prefix is not None else 0
        if self._reuse and not job.scores_prompt_now and self._computed_now(ids, found):
            return None
        row = self._free[-1]
        if not self._take_row(row, len(ids), prefix):
            return False
        job.row = self._free.pop()
        job.request.cached = found
        if job.reused_tokens is None:
            job.reused_tokens = found
            self.counts.reused_tokens += found
            self.counts.prompt_tokens += len(ids)
        self.waiting.remove(job)
        insort(self.running, job, key=lambda each: each.number)
        return True

    def _take_row(self, row: int, tokens: int, prefix: Prefix | None) -> bool:
        """Begin a row with a prefix and pages for ``tokens``; if there are none it stays free: False."""
        pages = self._session.pages
        part = [] if prefix is None or prefix.part is None else [prefix.part]
        pages.retain(part)  # making room must not take it
        self._session.adopt(row, prefix.stacks if prefix else (), prefix.head_map if prefix else self._no_map)
        made = False
        try:
            if made := self._promise(row, tokens):
                for stack in part:
                    self._session.copy_page(stack, row, prefix.tokens if prefix else 0)
        except BaseException:
            made = False
            raise
        finally:
            pages.forget(part)
            if not made:
                self._session.release(row)
        return made

    def _computed_now(self, ids: list[int], found: int) -> bool:
        """Whether a row is in a prompt that begins as ``ids`` do, for at least a page more than was found."""
        length = self._session.page_length
        more = (found // length + 1) * length
        if len(ids) <= more or more < self._shape.probe_tokens:
            return False
        return any(
            not job.scores_prompt_now
            and job.request.cached < len(job.request.ids) - 1
            and len(job.request.ids) > more
            and self._shape.side(len(job.request.ids)) == self._shape.side(len(ids))
            and job.request.ids[:more] == ids[:more]
            for job in self.running
        )

    def _no_memory(self, job: Job) -> ChaiError:
        _, budget = self._session.budget()
        return ChaiError(
            f"a text of {len(job.request.ids)} tokens has no memory left for its KV cache; shorten it or "
            f"{budget.fix}"
        )

    # Pages

    def _promise(self, row: int, tokens: int) -> bool:
        """Promise a row pages for ``tokens``, at the cost of beginnings that no row uses."""
        while not self._session.promise(row, tokens):
            if not self._tree.make_room(self._session.pages.missing(row, tokens)):
                return False
        return True

    def _room(self, job: Job, tokens: int) -> bool:
        """Promise a running job pages for ``tokens``, at the cost of younger ones; False if it gave way."""
        assert job.row is not None
        while not self._promise(job.row, tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is job:
                return False
        return True

    def _preempt(self, job: Job) -> None:
        """Take a job's row; what it has computed goes to the beginnings, where it may find it again."""
        self.counts.preempted += 1
        self._requeue(job)

    def _requeue(self, job: Job) -> None:
        self._leave(job, keep=True)
        job.request.cached = 0
        insort(self.waiting, job, key=lambda each: each.number)

    def _leave(self, job: Job, *, keep: bool) -> None:
        """Take a job's row, if it has one, and keep what the row has computed."""
        if job.row is None:
            return
        if keep:
            self._keep(job, job.request.cached)
        self._session.release(job.row)
        self._free.append(job.row)
        job.row = None
        self.running.remove(job)

    def _keep(self, job: Job, tokens: int) -> None:
        """Keep the first tokens of a row for texts to come, if they have settled its head map."""
        if not self._reuse or tokens < self._shape.probe_tokens:
            return
        assert job.row is not None
        ids, stacks = job.request.ids, self._session.pages.stacks_of(job.row)
        head_map = self._session.head_map[:, job.row].copy()
        self._tree.add(ids[:tokens], stacks, head_map, self._shape.side(len(ids)))

    # Steps

    def _windows(self) -> list[_Window]:
        """What each row feeds in this step, oldest text first."""
        probe = self._shape.probe_tokens
        prefilling = sum(self._left(job) > max(probe, 1) for job in self.running)
        chunk = max(PREFILL_TOKENS // max(prefilling, 1), probe)
        chunk = min(chunk, chunk_length(self._session, self._rows, self._shape.query_heads))
        windows = []
        for job in self.running.copy():
            if job.row is None:  # it gave way to an older one
                continue
            most = min(chunk, max(1, _SCORED // self._shape.vocab)) if job.scores_prompt_now else chunk
            start, end = job.request.next_window(probe, most)
            if self._room(job, end):
                windows.append(_Window(job, start, end))
        return windows

    def _left(self, job: Job) -> int:
        """Tokens that a job has to feed before its next token can be chosen."""
        request = job.request
        return len(request.ids) - (request.cached if request.cached >= self._shape.probe_tokens else 0)

    def _call(self, fed: Sequence[_Window]) -> None:
        """One call of the graph. Its failure is that of the jobs in it."""
        lengths = np.array([window.end - window.start for window in fed], np.int32)
        input_ids = np.zeros((len(fed), lengths.max()), np.int64)
        for line, window in zip(input_ids, fed, strict=True):
            line[: window.end - window.start] = window.job.request.ids[window.start : window.end]
        wanted = (lengths - 1).astype(np.int64)[:, None]
        scoring = fed[0].job.scores_prompt_now
        if scoring:
            wanted = np.arange(lengths[0], dtype=np.int64)[None]
        arguments = (
            input_ids,
            lengths,
            np.array([window.start for window in fed], np.int32),
            wanted,
            np.array([len(window.job.request.ids) for window in fed], np.int32),
            [window.job.row for window in fed if window.job.row is not None],
        )
        scored: Any
        try:
            if scoring:
                scored = self._session.step(*arguments)
            else:
                scored = step_rows(self._session, [window.job.wanted for window in fed], *arguments)
        except Exception as error:
            note(f"error: a step of {len(fed)} texts failed ({reason(error)})")
            for window in fed:
                self._finish(window.job, self._failure(error), keep=False)
            return
        for window, scores in zip(fed, scored, strict=True):
            try:
                self._advance(window, scores)
            except Exception as error:
                self._finish(window.job, self._failure(error), keep=False)

    def _advance(self, window: _Window, scores: Any) -> None:
        """Take the scores of the last token that a job has fed; of all, [N,V], while a prompt is scored."""
        job, request = window.job, window.job.request
        if job.scores_prompt_now:
            job.take_prompt(window.start, scores)
            scores = scores[-1]
        finished = request.fed(window.end)
        # Layers with a window give pages back as the prompt goes on: they are kept before.
        if not request.new_ids and (finished or self._session.pages.has_windows):
            length = self._session.page_length  # whole pages only: the row goes on writing in its last one
            self._keep(job, window.end // length * length)
        if not finished:
            return
        job.accept(scores)
        self.counts.new_tokens += 1
        if request.stop_reason is not None:
            self.counts.texts += 1
            self._finish(job, End(request.stop_reason))
        elif request.cached == 0:  # the cache is rotated for shorter texts
            self._requeue(job)

    def _finish(self, job: Job, end: End, *, keep: bool = True) -> None:
        """End a job and tell of it."""
        if job in self.waiting:
            self.waiting.remove(job)
        self._leave(job, keep=keep)
        self._tell(job, end)

    def _tell(self, job: Job, end: End) -> None:
        self.counts.failed += end.error is not None
        job.end = end
        job.listen(end)
        self._ended(job)

    @staticmethod
    def _failure(error: Exception) -> End:
        if isinstance(error, ChaiError):
            return End(error=error)
        return End(error=ChaiError(f"the step of this text failed ({reason(error)}); send it again"))
