"""Signals that end a command: each unwinds it as Ctrl-C does, so that nothing half-written stays behind."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SECONDS_UNTIL_REPEATED = 0.02
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; ``number`` is which. Libraries let it pass like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """The shell's convention: 128 and the number of the signal."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


@contextmanager
def unwinding() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted` in the block, each time they come.

    Yields the numbers of those that have come: a library may turn the exception into one of its own. A signal
    that is ignored stays so (``nohup``, background jobs of a shell). Outside the main thread, where Python
    allows no handlers, nothing changes.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Interrupted(number)

    with _handling(interrupt), _repeated_if_swallowed():
        yield received


@contextmanager
def _handling(interrupt: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in _ENDING}
        before = {number: action for number, action in found.items() if action not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextmanager
def _repeated_if_swallowed() -> Iterator[None]:
    """Let a signal come again whose exception Python drops, as in ``__del__`` and weak references."""
    timers: list[threading.Timer] = []

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not isinstance(error, Interrupted):
            report_others(unraisable)
            return
        again = [threading.main_thread().ident, error.number]
        timer = threading.Timer(_SECONDS_UNTIL_REPEATED, signal.pthread_kill, again)
        timer.daemon = True
        timers.append(timer)
        timer.start()

    report_others, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield
    finally:
        sys.unraisablehook = report_others
        for timer in timers:
            timer.cancel()


def ignore() -> None:
    """Let no further signal disturb the last words of a command that is ending."""
    if threading.current_thread() is threading.main_thread():
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
