"""Text to tokens, in pieces: calibration and evaluation read files of any size with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError
from chai_export.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Path | Sequence[int] | NDArray[Any]
"""A file (Path, or a str that names an existing file), a text, or token ids already."""

MOST_TOKENS = 1 << 24
"""Tokens read of a text unless a smaller number is asked for."""

_PIECE_CHARACTERS = 1 << 20
_LONGEST_PATH = 1024


def as_list(texts: Text | Iterable[Text]) -> list[Text]:
    """One text or several: always a list."""
    if isinstance(texts, (str, Path)):
        return [texts]
    items: list[Any] = list(texts)
    if items and all(isinstance(item, (int, np.integer)) for item in items):
        return [items]
    return items


def read_tokens(
    texts: Text | Iterable[Text], tokenizer: PreTrainedTokenizerBase | None, limit: int = MOST_TOKENS
) -> NDArray[np.int32]:
    """The first ``limit`` tokens of the texts, one after the other, without special tokens: int32 [N].

    Raises:
        ChaiError: a file is missing, unreadable, not UTF-8 or empty; there is no tokenizer for a text.
    """
    pieces: list[NDArray[np.int32]] = []
    count = 0
    for text in as_list(texts):
        for piece in _token_pieces(text, tokenizer):
            pieces.append(piece[: limit - count])
            count += len(pieces[-1])
            if count >= limit:
                return np.concatenate(pieces)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """What the tokenizer puts in front of every text: BOS, or nothing. Sequences start with it."""
    if tokenizer is None:
        return []
    with quiet():
        plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _token_pieces(text: Text, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[NDArray[np.int32]]:
    if not isinstance(text, (str, Path)):
        yield np.asarray(text, dtype=np.int32)
        return
    if tokenizer is None:
        raise ChaiError(
            "the model has no tokenizer, so text cannot be read; copy its tokenizer files beside it"
        )
    for piece in _character_pieces(text):
        with quiet():
            yield np.asarray(tokenizer(piece, add_special_tokens=False)["input_ids"], dtype=np.int32)


def _character_pieces(text: str | Path) -> Iterator[str]:
    """Pieces that end at line ends, so that a long file is tokenised almost as in one go."""
    path = _existing_file(text)
    if path is None:
        if not str(text).strip():
            raise ChaiError("the text is empty; give some text")
        yield str(text)
        return
    empty = True
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(_PIECE_CHARACTERS):
                empty = empty and not piece.strip()
                yield piece + file.readline()
    except UnicodeDecodeError as error:
        raise ChaiError(f"{path} is not UTF-8 text; convert it or give another file") from error
    except OSError as error:
        raise ChaiError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if empty:
        raise ChaiError(f"{path} is empty; give a file with text")


def _existing_file(text: str | Path) -> Path | None:
    """The file that ``text`` names; None if it is a text itself."""
    if isinstance(text, str):
        if len(text) > _LONGEST_PATH or "\n" in text or not Path(text).is_file():
            return None
        return Path(text)
    if text.is_dir():
        raise ChaiError(f"{text} is a directory; give a text file")
    if not text.exists():
        raise ChaiError(f"there is no text file {text}; check the path")
    return text
