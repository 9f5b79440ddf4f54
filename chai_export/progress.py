"""What is going on, on stderr, so that stdout stays free for results: notes and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from chai_export.units import duration_text

T = TypeVar("T")

FIRST_LINE_SECONDS = 10.0
LONGEST_SILENCE_SECONDS = 60.0
"""Lines of progress: none for quick work, then one whenever another tenth is done or a minute has passed."""


def note(text: str) -> None:
    """One line on stderr for people, such as an estimate before long work."""
    if sys.stderr is not None:  # print() would take stdout instead
        print(text, file=sys.stderr)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield from ``iterable`` while stderr shows how far it is: a bar on a terminal, lines in a log.

    Args:
        iterable: the work.
        description: what is done, such as "calibrating".
        total: the number of items; ``len(iterable)`` unless given, and unknown where there is no length.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr is None or not sys.stderr.isatty():
        yield from _with_lines(iterable, ProgressLines(description, total))
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(iterable, total=total, description=description)


def _with_lines(iterable: Iterable[T], lines: ProgressLines) -> Iterator[T]:
    for done, item in enumerate(iterable, start=1):
        yield item
        lines.after(done)
    lines.finish()


class ProgressLines:
    """Progress for a log: ``calibrating: 30% (39 of 128), 0:42 elapsed, about 1:37 left``.

    Work of a few seconds stays silent. ``clock`` gives seconds, ``show`` takes a line.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        show: Callable[[str], None] = note,
    ) -> None:
        self._description = description
        self._total = total
        self._clock = clock
        self._show = show
        self._began = self._last = clock()
        self._tenths = 0
        self._spoke = False

    def after(self, done: int) -> None:
        """Note that ``done`` items are finished; prints a line if it is time for one."""
        now = self._clock()
        tenths = 10 * done // self._total if self._total else 0
        quiet = now - self._last
        due = tenths > self._tenths and quiet >= FIRST_LINE_SECONDS
        if not due and quiet < LONGEST_SILENCE_SECONDS:
            return
        self._last, self._tenths, self._spoke = now, tenths, True
        elapsed = now - self._began
        if not self._total:
            self._show(f"{self._description}: {done}, {duration_text(elapsed)} elapsed")
        elif done < self._total:
            left = elapsed * (self._total - done) / done
            self._show(
                f"{self._description}: {done / self._total:.0%} ({done} of {self._total}), "
                f"{duration_text(elapsed)} elapsed, about {duration_text(left)} left"
            )

    def finish(self) -> None:
        """The last line, if there was any other."""
        if self._spoke:
            self._show(f"{self._description}: done in {duration_text(self._clock() - self._began)}")
