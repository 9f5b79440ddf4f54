"""Numbers as people read and write them."""

from __future__ import annotations

import re

from chai_export.errors import UsageError

_BYTES = {"": 1, "B": 1}
_BYTES |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_BYTES |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_BY_NAME = {unit.lower(): factor for unit, factor in _BYTES.items()}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)


def bytes_text(count: float) -> str:
    """A byte count with a binary unit: 1536 is ``1.5 KiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def bytes_of(text: str, name: str) -> int:
    """The byte count that ``text`` means: ``2GiB`` is 2 · 1024³, ``500MB`` 500,000,000, ``4096`` itself.

    Raises:
        UsageError: it is no size of at least one byte; the message begins with ``name``.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _BY_NAME.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{name} is {text!r}; give a size such as 2GiB, 500MB or a number of bytes")
    count = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if count < 1:
        raise UsageError(f"{name} is {text!r}; give at least one byte")
    return count


def duration_text(seconds: float) -> str:
    """A time as minutes and seconds: 75 is ``1:15``, 3675 is ``1:01:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
