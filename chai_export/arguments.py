"""Arguments of public functions: what is of another kind is refused by name, not guessed at.

Python would go on with many: ``int(2.7)`` is 2, ``int("7")`` is 7, the items of ``b"text"`` are numbers.
"""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chai_export.errors import UsageError

MOST = 2**31 - 1
"""The largest count: sizes and positions are int32 in every graph and kernel."""


def whole(value: object, name: str, *, least: int = 1, most: int = MOST) -> int:
    """``value`` as an int; NumPy's integers are taken too, truth values, floats and texts are not.

    Raises:
        UsageError: it is no whole number from ``least`` to ``most``.
    """
    number = as_integer(value)
    if number is None:
        raise UsageError(f"{name} is {shown(value)}; give a whole number")
    if not least <= number <= most:
        raise UsageError(f"{name} is {shown(number)}; give {_range(number, least, most)}")
    return number


def require_at_least_one(**values: object) -> None:
    """Raise unless each value that is not None is a whole number from 1; named as on the command line.

    Raises:
        UsageError: naming the flag.
    """
    for name, value in values.items():
        if value is not None:
            whole(value, f"--{name.replace('_', '-')}")


def as_integer(value: object) -> int | None:
    """``value`` as an int if it is an integer of any library, else None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # a tensor of several values, or of floats
        return None


def as_real(value: object) -> float | None:
    """``value`` as a float if it is a number of any library that a float can hold, else None."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def whole_numbers(value: Any, name: str) -> list[int]:
    """``value`` as a list of ints: a sequence, or a one-dimensional array or tensor, of integers.

    Raises:
        UsageError: it is anything else (text, bytes, an iterator, which can be read once only), or holds
            anything else.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)) or not hasattr(value, "__getitem__"):
        raise UsageError(f"{name} is {shown(value)}; give a list of whole numbers")
    try:
        items = list(value)
    except TypeError:  # an array without dimensions
        raise UsageError(f"{name} is {shown(value)} without items; give a list of whole numbers") from None
    numbers = [as_integer(item) for item in items]
    for item, number in zip(items, numbers, strict=True):
        if number is None:
            raise UsageError(f"{name} holds {shown(item)} ; give whole numbers only")
    return [number for number in numbers if number is not None]


def path_of(value: object, name: str) -> Path:
    """``value`` as a Path.

    Raises:
        UsageError: it is neither a text nor a path, or is empty, or no file can have that name.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise UsageError(f"{name} is {shown(value)}; give a path")
    text = str(os.fspath(value))
    try:
        bytes_ = os.fsencode(text)
    except UnicodeEncodeError:
        bytes_ = b""
    if not bytes_ or 0 in bytes_:
        raise UsageError(f"{name} is {shown(text)}, which is no path; give one")
    return Path(text)


def shown(value: Any) -> str:
    """A value for a message: short, and with its kind where it could be taken for another."""
    if value is None or isinstance(value, (bool, int, float)):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    elif isinstance(value, (str, bytes)):
        text = repr(value)
    else:
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:79] + "…"


def _range(number: int, least: int, most: int) -> str:
    return f"{least} to {most}" if number > most else f"{least} or more"
