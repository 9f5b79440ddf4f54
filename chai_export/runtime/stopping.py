"""Stop strings in a text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from chai_export.choice import Choice
from chai_export.errors import UsageError


class StopReason(Choice):
    """What ended a text: an end-of-sequence token, a stop string, ``max_new_tokens``, no position left."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CAPACITY = "capacity"


class StopStrings:
    """Passes text on until one of the strings appears, and never shows a part of it.

    Text that may be the beginning of a stop string is held back until that is decided.

    Raises:
        UsageError: one of the strings is empty.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        if not all(strings):
            raise UsageError(
                "--stop got an empty text, which would stop at once; give at least one character"
            )
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; return what is safe to show. After a stop string ``found`` is set and nothing shown."""
        if self.found:
            return ""
        self._held += text
        # The string that ends first counts, so that it does not matter how the text was cut into pieces.
        found = [(at + len(string), at) for string in self._strings if (at := self._held.find(string)) >= 0]
        if found:
            self.found = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((self._overlap(string) for string in self._strings), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, string: str) -> int:
        """Length of the longest end of the held text that begins ``string``."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)
