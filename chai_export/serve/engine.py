"""The thread that owns a session: jobs come from any thread, and are told of tokens as these are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from threading import Condition, Thread

from chai_export.errors import ChaiError, reason
from chai_export.progress import note
from chai_export.serve.batch import Batch
from chai_export.serve.job import Job

_LONGEST_RETRY = 60


class QueueFullError(ChaiError):
    """There is no place to wait; ``retry_after`` seconds from now there may be."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} texts are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(ChaiError):
    """The engine takes no more jobs."""


class Engine:
    """Runs a batch on a thread of its own until it is closed.

    Args:
        make: makes the batch, given what it is to call with each job that has ended; called on this thread.
        rows: of the batch.
        max_waiting: jobs beyond those that have a row.

    Attributes:
        ended: called with each job that has ended, on the engine's thread; to be replaced.
    """

    def __init__(
        self,
        make: Callable[[Callable[[Job], None]], Batch],
        *,
        rows: int,
        max_waiting: int,
    ) -> None:
        self.rows = rows
        self.max_waiting = max_waiting
        self.ended: Callable[[Job], None] = lambda job: None
        self._changed = Condition()
        self._new: list[Job] = []
        self._gone: list[Job] = []
        self._open = 0
        self._closed = False
        self._seconds = 1.0
        self.batch = make(self._note_end)
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def open_jobs(self) -> int:
        """Jobs that were submitted and have not ended."""
        return self._open

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._closed

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of some jobs, or none.

        Raises:
            QueueFullError: there is no place for them now.
            ClosedError: the engine was closed.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the server is shutting down; try again later")
            if self._open + len(jobs) > self.rows + self.max_waiting:
                waiting = max(0, self._open - self.rows)
                turns = (waiting + len(jobs)) / self.rows
                raise QueueFullError(waiting, min(_LONGEST_RETRY, math.ceil(self._seconds * turns)))
            self._open += len(jobs)
            self._new.extend(jobs)
            self._changed.notify()

    def abort(self, jobs: Sequence[Job]) -> None:
        """End jobs soon, if they have not ended."""
        with self._changed:
            self._gone.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """End the jobs that there are with an error, and wait for the thread to end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            self._closed = True

    def _loop(self) -> None:
        batch = self.batch
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._gone or self._closed or batch.busy)
                (new, gone), closed = (self._new, self._gone), self._closed
                self._new, self._gone = [], []
            for job in new:
                batch.add(job)
            if closed:
                batch.fail_all(ClosedError("the server was shut down before the text had ended"))
                return
            try:
                for job in gone:
                    batch.abort(job)
                batch.step()
            except Exception as error:
                note(f"error: the server begins anew ({reason(error)})")
                batch.fail_all(error)

    def _note_end(self, job: Job) -> None:
        times = job.request.token_times
        with self._changed:
            self._open -= 1
            if times:
                self._seconds += 0.1 * (times[-1] - job.submitted - self._seconds)
        self.ended(job)
