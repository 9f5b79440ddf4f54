"""The errors that a user sees: one line, with the cause and what to change."""

from __future__ import annotations


class ChaiError(Exception):
    """Something the user can mend. The message is one line: cause first, then the fix.

    The command line prints it as ``error: …`` and exits with 1, without a traceback.
    """


class UsageError(ChaiError):
    """A command or call that was put together wrongly; the command line exits with 2."""
