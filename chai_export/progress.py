"""Progress bars on stderr, so that stdout stays free for results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def note(text: str) -> None:
    """One line on stderr for people, such as an estimate before long work."""
    from rich.console import Console

    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield from ``iterable`` while a bar on stderr shows how far it is.

    Nothing is drawn when stderr is not a terminal, so logs stay readable.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        yield from progress.track(iterable, total=total, description=description)
