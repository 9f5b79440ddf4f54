"""The generation loop: rows come when there is room for all of their text, and go when it ends.

1. *Pool.* As many pages as the largest texts that can run together may need, within the session's budget.
2. *Admission.* In the order of the prompts: the next one gets a free row once all the pages that its text can
   need are promised. Otherwise it waits, and those behind it too.
3. *Step.* Every row feeds its next chunk of prompt or its last token, in the calls that compute the fewest
   tokens (:mod:`chai_export.runtime.calls`).
4. *End.* A row whose text has ended gives its pages back and is in no further call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from chai_export.errors import ChaiError
from chai_export.runtime.calls import plan_calls
from chai_export.runtime.likeliest import step_rows
from chai_export.runtime.request import Request
from chai_export.runtime.session import Session

LONGEST_CHUNK = 512
# Elements of one score matrix when attention makes whole ones: 256 MiB of float32, of which the function
# body holds about five at a time.
_SCORES = 1 << 26


def longest_call(probe_tokens: int) -> int:
    """New tokens of a row in one call, at most."""
    return max(LONGEST_CHUNK, probe_tokens)


def chunk_length(session: Session, batch: int, query_heads: int) -> int:
    """New tokens per row and step, so that a step's scratch memory stays bounded."""
    if session.bounded_scratch:
        return LONGEST_CHUNK
    return int(np.clip(_SCORES // (batch * query_heads * max(session.capacity, 1)), 1, LONGEST_CHUNK))


class Scheduler:
    """Runs requests to their end on at most ``slots`` rows at a time."""

    def __init__(self, session: Session, *, slots: int, query_heads: int, probe_tokens: int) -> None:
        self._session = session
        self._query_heads = query_heads
        self._probe_tokens = probe_tokens
        self._rows: list[Request | None] = [None] * slots

    def run(self, requests: Sequence[Request]) -> None:
        """Generate until every request has a stop reason.

        Raises:
            ChaiError: memory that was free when the call began is not any more, and nothing runs that would
                give some back.
        """
        self._session.drop()
        self._session.start(len(self._rows), self._pages(requests), longest_call(self._probe_tokens))
        waiting = deque(requests)
        while True:
            self._admit(waiting)
            if not any(self._rows):
                return
            self._step()

    def _pages(self, requests: Sequence[Request]) -> int:
        """Pages of the pool: what the longest of as many texts as there are rows may need, within the budget.

        One text always fits: its limits were set by the budget when the call began.
        """
        length = self._session.page_length
        wanted = sorted((-(-request.most_tokens // length) for request in requests), reverse=True)
        tokens, _ = self._session.budget(len(self._rows), longest_call(self._probe_tokens))
        return max(wanted[0], min(sum(wanted[: len(self._rows)]), tokens // length))

    def _admit(self, waiting: deque[Request]) -> None:
        for row, request in enumerate(self._rows):
            if request is None and waiting:
                if not self._session.promise(row, waiting[0].most_tokens):
                    break
                self._rows[row] = waiting.popleft()
        if waiting and not any(self._rows):
            _, budget = self._session.budget()
            raise ChaiError(
                f"a row of {waiting[0].most_tokens} tokens has no memory left for its KV cache; "
                f"lower --max-seq, give shorter prompts, or {budget.fix}"
            )

    def _step(self) -> None:
        active = [(row, request) for row, request in enumerate(self._rows) if request is not None]
        chunk = chunk_length(self._session, len(active), self._query_heads)
        windows = [request.next_window(self._probe_tokens, chunk) for _, request in active]
        for call in plan_calls([end - start for start, end in windows]):
            self._call([(*active[i], *windows[i]) for i in call])

    def _call(self, fed: Sequence[tuple[int, Request, int, int]]) -> None:
        """One call of the graph: row, request, and the positions start … end - 1 that it feeds."""
        lengths = np.array([end - start for *_, start, end in fed], np.int32)
        input_ids = np.zeros((len(fed), lengths.max()), np.int64)
        for ids, (_, request, start, end) in zip(input_ids, fed, strict=True):
            ids[: end - start] = request.ids[start:end]
        scored = step_rows(
            self._session,
            [request.sampler.top for _, request, *_ in fed],
            input_ids,
            lengths,
            np.array([start for *_, start, _ in fed], np.int32),
            (lengths - 1).astype(np.int64)[:, None],
            np.array([len(request.ids) for _, request, *_ in fed], np.int32),
            [row for row, *_ in fed],
        )
        for (row, request, _, end), scores in zip(fed, scored, strict=True):
            if request.fed(end):
                request.accept(scores)
            if request.stop_reason is not None:
                request.head_map = self._session.head_map[:, row]
                self._session.release(row)
                self._rows[row] = None
