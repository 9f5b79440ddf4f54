"""Text to tokens, in pieces: calibration and evaluation read files of any size with bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.arguments import MOST, as_integer, shown, whole_numbers
from chai_export.bundle.tokenizer import encode
from chai_export.errors import ChaiError, UsageError
from chai_export.files import open_file
from chai_export.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Text = str | Path | Sequence[int] | NDArray[Any]
"""A file (Path, or a str that names an existing file), a text, or token ids already."""

MOST_TOKENS = 1 << 24
"""Tokens read of a text unless a smaller number is asked for."""

_PIECE_CHARACTERS = 1 << 20
_LONGEST_PATH = 1024


def as_list(texts: Text | Iterable[Text]) -> list[Text]:
    """One text or several: always a list.

    Raises:
        UsageError: neither.
    """
    if isinstance(texts, (str, Path)):
        return [texts]
    if isinstance(texts, (bytes, bytearray)) or not isinstance(texts, Iterable):
        raise UsageError(f"the text is {shown(texts)}; give a path, a text or a list of token ids")
    items: list[Any] = list(texts)
    if items and all(as_integer(item) is not None for item in items):
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


def require_in_vocabulary(tokens: NDArray[np.int32], model: PreTrainedModel) -> None:
    """Raise unless the model has an embedding for each token.

    Raises:
        ChaiError: it has not: the ids, or the tokenizer that made them, belong to another model.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if tokens.size and int(tokens.max()) >= size:
        raise ChaiError(
            f"token id {int(tokens.max())} is not in the model's vocabulary of {size}; give ids, or the "
            "tokenizer, of this model"
        )


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """What the tokenizer puts in front of every text: BOS, or nothing. Sequences start with it."""
    if tokenizer is None:
        return []
    with quiet():
        plain = encode(tokenizer, "a", add_special_tokens=False)
        whole = encode(tokenizer, "a")
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _token_pieces(text: Text, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[NDArray[np.int32]]:
    if not isinstance(text, (str, Path)):
        ids = whole_numbers(text, "a text")
        if any(not 0 <= i <= MOST for i in ids):
            raise UsageError("a text holds a number that is no token id; give ids of the model's vocabulary")
        yield np.asarray(ids, dtype=np.int32)
        return
    if tokenizer is None:
        raise ChaiError(
            "the model has no tokenizer, so text cannot be read; copy its tokenizer files beside it"
        )
    for piece in _character_pieces(text):
        with quiet():
            yield np.asarray(encode(tokenizer, piece, add_special_tokens=False), dtype=np.int32)


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
        with io.TextIOWrapper(open_file(path), encoding="utf-8") as file:
            while piece := file.read(_PIECE_CHARACTERS):
                empty = empty and not piece.strip()
                yield piece + file.readline()
    except UnicodeDecodeError as error:
        raise ChaiError(f"{path} is not UTF-8 text; convert it or give another file") from error
    except OSError as error:
        raise ChaiError(f"{path} cannot be read ({error.strerror}); give a file with text") from error
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
