"""Methods of which an object runs one at a time: a second call is refused, whoever makes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import Lock
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from chai_export.errors import UsageError


class Guarded(Protocol):
    """An object with a lock that is held while one of its methods runs."""

    _running: Lock


G = TypeVar("G", bound=Guarded)
P = ParamSpec("P")
R = TypeVar("R")


def one_at_a_time(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
    """``method`` raises UsageError while it or another such method of the object runs.

    Waiting instead would be a deadlock for a call from inside the running one, and would hide from threads
    that their calls queue.
    """

    @functools.wraps(method)
    def guarded(self: G, /, *arguments: P.args, **named: P.kwargs) -> R:
        if not self._running.acquire(blocking=False):
            raise UsageError(
                f"{method.__name__} was called while another call of the same {type(self).__name__} goes on; "
                "wait until that returns, or load one for each thread"
            )
        try:
            return method(self, *arguments, **named)
        finally:
            self._running.release()

    return guarded
