"""The errors that a user sees: one line, with the cause and what to change."""

from __future__ import annotations


class ChaiError(Exception):
    """Something the user can mend. The message is one line: cause first, then the fix.

    The command line prints it as ``error: …`` and exits with 1, without a traceback.
    """


class UsageError(ChaiError):
    """A command or call that was put together wrongly; the command line exits with 2."""


def require_at_least_one(**values: int | None) -> None:
    """Raise unless each value that is given is 1 or more; the names are those of command-line flags.

    Raises:
        UsageError: naming the flag.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; give 1 or more")
