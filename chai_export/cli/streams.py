"""The standard streams of a process: closed, full, broken or of a narrow encoding, none gives a traceback.

What cannot be written to stdout ends the command with one line; what cannot be written to stderr is dropped,
since nothing is left to say it with. A character that the encoding lacks is written as an escape.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from chai_export.errors import ChaiError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDIN, _STDOUT, _STDERR = range(3)


class OutputError(ChaiError):
    """Stdout takes nothing more: its disk is full, or it was closed before the command began."""


class _Output(io.FileIO):
    """Stdout. Its errors are told from those of files; a reader that has gone stays BrokenPipeError."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"standard output cannot be written ({error.strerror}), so the result is not there in full; "
                "give it another place"
            ) from error


class _Messages(io.FileIO):
    """Stderr. Work goes on when nobody can be told of it."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def prepare() -> None:
    """Make the streams of this process ones that the rest of the program can write to in any case.

    A closed descriptor is opened on /dev/null, so that no file of the program's gets its number: then results
    meant for stdout would go into that file.
    """
    _occupy_closed()
    sys.stdout = _stream(sys.stdout, _Output(_STDOUT, "w", closefd=False))
    sys.stderr = _stream(sys.stderr, _Messages(_STDERR, "w", closefd=False))


def discard_output() -> None:
    """Send what stdout still holds, and all that follows, nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _occupy_closed() -> None:
    """Stdin and stdout for reading only: whoever writes a result to a closed stdout is told so."""
    for descriptor, flags in ((_STDIN, os.O_RDONLY), (_STDOUT, os.O_RDONLY), (_STDERR, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number, which is this one


def _stream(before: TextIO | None, raw: io.FileIO) -> io.TextIOWrapper:
    """Text on top of ``raw``, encoded as ``before`` was and flushed as often."""
    if isinstance(before, io.TextIOWrapper):
        before.flush()
        encoding, lines = before.encoding, before.line_buffering or before.write_through
    else:
        encoding, lines = "utf-8", False
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=lines)
