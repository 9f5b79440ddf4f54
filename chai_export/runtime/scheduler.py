"""The generation loop: requests share the rows of one batch, each in its own phase.

A row is prefilled in chunks, then decoded; when its text ends the next waiting prompt takes it. The op makes
this simple: a row with length 0 is left alone, a row with past length 0 starts afresh.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chai_export.runtime.cache import grown_capacity
from chai_export.runtime.request import Request
from chai_export.runtime.session import GrowingSession, Session

LONGEST_CHUNK = 512
_FIRST_CAPACITY = 64
# Elements of one score matrix when attention makes whole ones: 256 MiB of float32, of which the function
# body holds about five at a time.
_SCORES = 1 << 26


def chunk_length(session: Session, batch: int, query_heads: int) -> int:
    """New tokens per row and step, so that a step's scratch memory stays bounded."""
    if session.bounded_scratch:
        return LONGEST_CHUNK
    return int(np.clip(_SCORES // (batch * query_heads * max(session.capacity, 1)), 1, LONGEST_CHUNK))


def first_capacity(needed: int, limit: int) -> int:
    """Capacity to begin with for ``needed`` tokens: rounded up, within the limit."""
    return min(limit, -(-needed // _FIRST_CAPACITY) * _FIRST_CAPACITY)


class Scheduler:
    """Runs requests to their end on ``slots`` rows of a session.

    ``peak_tokens`` is the largest number of tokens that the caches held at one time.
    """

    def __init__(
        self, session: GrowingSession, *, slots: int, limit: int, query_heads: int, probe_tokens: int
    ) -> None:
        self._session = session
        self._limit = limit
        self._query_heads = query_heads
        self._probe_tokens = probe_tokens
        self._rows: list[Request | None] = [None] * slots
        self._held = [0] * slots
        self.peak_tokens = 0

    def run(self, requests: Sequence[Request]) -> None:
        """Generate until every request has a stop reason."""
        waiting = deque(requests)
        needed = max(r.prompt_tokens + min(r.limits.max_new_tokens, _FIRST_CAPACITY) for r in requests)
        self._session.begin(len(self._rows), first_capacity(needed, self._limit))
        while True:
            self._assign(waiting)
            if not any(self._rows):
                return
            self._step()

    def _assign(self, waiting: deque[Request]) -> None:
        for row, request in enumerate(self._rows):
            if request is None and waiting:
                self._rows[row] = waiting.popleft()

    def _step(self) -> None:
        slots = len(self._rows)
        chunk = chunk_length(self._session, slots, self._query_heads)
        windows = [r.next_window(self._probe_tokens, chunk) if r else (0, 0) for r in self._rows]
        self._make_room(max(end for _, end in windows))

        lengths = np.array([end - start for start, end in windows], np.int32)
        past_lengths = np.array([start for start, _ in windows], np.int32)
        input_ids = np.zeros((slots, lengths.max()), np.int64)
        for row, (request, (start, end)) in enumerate(zip(self._rows, windows, strict=True)):
            if request is not None:
                input_ids[row, : end - start] = request.ids[start:end]
        last = np.maximum(lengths - 1, 0).astype(np.int64)[:, None]
        rope_lengths = np.array([len(r.ids) if r else 0 for r in self._rows], np.int32)
        logits = self._session.step(input_ids, lengths, past_lengths, last, rope_lengths)

        for row, (_, end) in enumerate(windows):
            self._advance(row, end, logits[row, 0])
        self.peak_tokens = max(self.peak_tokens, sum(self._held))

    def _make_room(self, needed: int) -> None:
        if needed > self._session.capacity:
            self._session.grow(grown_capacity(self._session.capacity, needed, self._limit))

    def _advance(self, row: int, end: int, logits: NDArray[np.float32]) -> None:
        request = self._rows[row]
        if request is None:
            return
        self._held[row] = end
        if not request.fed(end):
            return
        request.accept(logits)
        if request.stop_reason is not None:
            request.head_map = self._session.head_map[:, row]
            self._rows[row] = None
