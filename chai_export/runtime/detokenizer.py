"""Text from tokens as they come, with characters that span several tokens kept whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8


class Detokenizer:
    """Decodes one row's new tokens, one at a time.

    A token alone does not decide its text (a leading space, a part of a UTF-8 character), so each piece is
    the difference between two decodings of a short window that starts in text already shown, at first in
    the prompt. Special tokens give no text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._window = 0
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now (may be empty)."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """The rest, incomplete characters included, when no more tokens will come."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._window : self._shown])
        after = self._decode(self._ids[self._window :])
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up spaces would change text that was shown before.
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
