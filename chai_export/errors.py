"""The errors that a user sees: one line, with the cause and what to change."""

from __future__ import annotations

_LONGEST_REASON = 300


class ChaiError(Exception):
    """Something the user can mend. The message is one line: cause first, then the fix.

    The command line prints it as ``error: …`` and exits with 1, without a traceback.
    """


class UsageError(ChaiError):
    """A command or call that was put together wrongly; the command line exits with 2."""


def reason(problem: object) -> str:
    """What an exception or a message of another library says, as one line to quote in a message of ours.

    Of a long text that is the first line that says something: what follows are dumps and advice. An exception
    without a text is named by its type.
    """
    lines = [line for line in (line.strip().rstrip(" .:") for line in str(problem).splitlines()) if line]
    text = " ".join(lines)
    if len(text) > _LONGEST_REASON:
        text = lines[0]
    if len(text) > _LONGEST_REASON:
        text = text[: _LONGEST_REASON - 1] + "…"
    return printable(text) or type(problem).__name__


def printable(text: str) -> str:
    """``text`` on one line, with what a terminal would act on or cannot encode written as escapes."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def last_line(output: str, otherwise: str = "no message") -> str:
    """The last line that a failed program printed: its error; what came before led to it."""
    lines = output.strip().splitlines()
    return reason(lines[-1]) if lines else otherwise
