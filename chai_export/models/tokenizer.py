"""The tokenizer of a model; a SentencePiece file alone is read as SentencePiece reads it, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chai_export.bundle.text_tokenizer import WHOLE
from chai_export.bundle.tokenizer import encode, tried
from chai_export.errors import ChaiError
from chai_export.models.folder import has_tokenizer
from chai_export.models.gguf_source import pretrained, require_gguf
from chai_export.models.loading import resolve_source
from chai_export.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECES = "tokenizer.model"
_SAMPLE = "The first 1234 tokens,  in a café:\n\tdef head_map(self): return {'naïve': \"数\"}\nand the rest."


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """Tokenizer of a directory or hub id; None when a directory has none.

    Raises:
        ChaiError: the tokenizer files are there but cannot be read, or transformers reads them wrongly.
    """
    where, offline = resolve_source(source)
    if isinstance(where, Path) and where.is_file():
        require_gguf(where)
    elif isinstance(where, Path) and not has_tokenizer(where):
        return None
    named: Path | str = str(where) if isinstance(where, Path) and where.is_file() else where
    tokenizer = tried(lambda: _load("AutoTokenizer", where, offline), named)
    pieces = _pieces_alone(where)
    if pieces is None:
        return tokenizer
    return _as_sentencepiece(tokenizer, pieces, where, offline)


def _load(kind: str, where: Path | str, offline: bool) -> PreTrainedTokenizerBase:
    import transformers

    place, further = pretrained(where)
    with quiet():
        loaded = getattr(transformers, kind).from_pretrained(place, **further, local_files_only=offline)
    return cast("PreTrainedTokenizerBase", loaded)


def _pieces_alone(where: Path | str) -> Path | None:
    """The SentencePiece file of a model that has no tokenizer.json, which would say everything."""
    if isinstance(where, Path):
        found = {name: where / name for name in (_PIECES, WHOLE) if (where / name).is_file()}
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = {name: try_to_load_from_cache(where, name) for name in (_PIECES, WHOLE)}
        found = {name: Path(path) for name, path in cached.items() if isinstance(path, str)}
    return None if WHOLE in found else found.get(_PIECES)


def _as_sentencepiece(
    tokenizer: PreTrainedTokenizerBase, pieces: Path, where: Path | str, offline: bool
) -> PreTrainedTokenizerBase:
    """A tokenizer that cuts text as SentencePiece itself does with the same file.

    Without a tokenizer_config.json that names its class, and for some families in spite of it, transformers
    makes a tokenizer of another kind from the file: without the space in front of a text, or byte-level.

    Raises:
        ChaiError: transformers has none that agrees.
    """
    processor = _processor(pieces)
    if processor is None:
        return tokenizer  # tiktoken's files have the same name
    expected = processor.encode(_SAMPLE)
    if _ids(tokenizer) == expected:
        return tokenizer
    try:
        other = _load("LlamaTokenizer", where, offline)
    except Exception:  # as above; what it cannot read it is not the class of
        other = None
    if other is None or _ids(other) != expected:
        raise ChaiError(
            f"transformers reads {pieces} otherwise than SentencePiece does, so tokens would be wrong; "
            f"copy the model's {WHOLE} beside it"
        )
    return other


def _processor(pieces: Path) -> Any | None:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    except (OSError, RuntimeError):
        return None


def _ids(tokenizer: Any) -> list[int]:
    with quiet():
        return encode(tokenizer, _SAMPLE, add_special_tokens=False)
