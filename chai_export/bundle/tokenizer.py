"""The one door to tokenizers: read from a directory, tried once, and used so that a fault is one line.

transformers and tokenizers believe the files that they read: content of another shape ends in whatever Python
raises there, when a tokenizer is read, at its first text, or in its chat template, which is a program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chai_export.arguments import as_integer
from chai_export.bundle.text_tokenizer import CONFIGURATION, RECORD, WHOLE, read_text_tokenizer
from chai_export.errors import ChaiError, reason
from chai_export.files import MissingFileError, is_unicode, open_file, read_json

_JSON_FILES = (WHOLE, CONFIGURATION, "special_tokens_map.json", "added_tokens.json")
_AGAIN = "copy the tokenizer files of the model again"


def load_tokenizer(directory: Path) -> Any | None:
    """The tokenizer saved in ``directory``, or None if there is none. Never runs code from the directory.

    That is a :class:`~chai_export.bundle.text_tokenizer.TextTokenizer`, or one of transformers where only
    transformers reads it rightly.

    Raises:
        ChaiError: its files cannot be loaded; names the file where one is to blame.
    """
    if not (directory / CONFIGURATION).is_file():
        return None
    if not (directory / RECORD).is_file():
        return load_transformers_tokenizer(directory)
    return tried(lambda: read_text_tokenizer(directory), directory, fix="pass token ids or export again")


def load_transformers_tokenizer(directory: Path) -> Any | None:
    """The same as transformers loads it, for who needs more of it than ids, texts and chats.

    Raises:
        ChaiError: its files cannot be loaded; names the file where one is to blame.
    """
    if not (directory / CONFIGURATION).is_file():
        return None
    from transformers import AutoTokenizer

    return tried(
        lambda: AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False),
        directory,
        fix="pass token ids or export again",
    )


def tried(read: Callable[[], Any], source: Path | str, *, fix: str = _AGAIN) -> Any:
    """What ``read`` returns, a tokenizer that turns a text into ids.

    Args:
        read: reads the tokenizer.
        source: its directory, or a name for messages.
        fix: ends the message about a tokenizer that cannot be used.

    Raises:
        ChaiError: it cannot be read, or fails at a text.
    """
    if isinstance(source, Path):
        _require_files(source, fix)
    try:
        tokenizer = read()
        ids = tokenizer("a")["input_ids"]
    except BaseException as error:
        if not _is_fault(error):
            raise
        raise _blamed(error, source, fix) from error
    if not isinstance(ids, list) or any(as_integer(each) is None for each in ids):
        raise ChaiError(f"the tokenizer of {source} makes no token ids of a text; {fix}")
    return tokenizer


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text.

    Raises:
        ChaiError: the text is no Unicode, or the tokenizer fails at it.
    """
    if not is_unicode(text):
        raise ChaiError("a text has half of a surrogate pair, which stands for no character; remove it")
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except BaseException as error:
        if not _is_fault(error):
            raise
        raise ChaiError(f"the tokenizer fails at a text ({reason(error)}); {_AGAIN}") from error


def render_chat(
    tokenizer: Any,
    turns: str | Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    otherwise: str = "leave out --chat",
) -> str:
    """A chat in the words of the tokenizer's chat template, ready for the answer.

    Args:
        tokenizer: the bundle's.
        turns: messages with ``role`` and ``content``; a text is one turn of a user.
        tools: functions that the answer may call, as the template wants them.
        otherwise: ends a message: what the user can do without a template.

    Raises:
        ChaiError: there is no template; it is no template, asks for what transformers' sandbox refuses, or
            fails.
    """
    if not tokenizer.chat_template:
        raise ChaiError(f"the bundle's tokenizer has no chat template; {otherwise}")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    given: dict[str, Any] = {} if tools is None else {"tools": list(tools)}
    try:
        rendered = tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, tokenize=False, **given
        )
    except Exception as error:  # a template can raise anything
        raise ChaiError(
            f"the tokenizer's chat template fails ({reason(error)}); mend it in the model "
            f"(chat_template.jinja, or in {CONFIGURATION}) and export again, or {otherwise}"
        ) from error
    return str(rendered)


def _require_files(directory: Path, fix: str) -> None:
    """Raise unless what has the name of a tokenizer file can be read to an end."""
    for name in _JSON_FILES:
        path = directory / name
        try:
            open_file(path).close()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ChaiError(f"{path} cannot be read ({error.strerror}); {fix}") from error


def _is_fault(error: BaseException) -> bool:
    """Whether an exception comes from the files: also a panic of Rust code, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _blamed(error: BaseException, source: Path | str, fix: str) -> ChaiError:
    """The error, laid on one file where a file is no JSON object or is refused by itself."""
    if not isinstance(source, Path):
        return ChaiError(f"the tokenizer of {source} cannot be read ({reason(error)}); {fix}")
    for name in _JSON_FILES:
        try:
            read_json(source / name, fix=fix, exact=False)
        except MissingFileError:
            continue
        except ChaiError as problem:
            return problem
    problem_of_file = _refused_alone(source / WHOLE)
    where = f"the tokenizer of {source}" if problem_of_file is None else str(source / WHOLE)
    return ChaiError(f"{where} cannot be read ({problem_of_file or reason(error)}); {fix}")


def _refused_alone(path: Path) -> str | None:
    """What the tokenizers library says of a tokenizer.json; None if it takes it, or there is none."""
    from tokenizers import Tokenizer

    if not path.is_file():
        return None
    try:
        Tokenizer.from_file(str(path))
    except BaseException as error:
        if not _is_fault(error):
            raise
        return reason(error)
    return None
