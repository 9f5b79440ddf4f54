"""The tokenizer of a bundle without transformers, which takes seconds to import.

A bundle's ``tokenizer.json`` is all that the tokenizers library needs. What transformers knows beside it is
written when the bundle is made, into a small file whose presence says that both were tried on texts and
agreed; a bundle without that file has a tokenizer that only transformers reads rightly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chai_export.errors import ChaiError
from chai_export.files import read_json, read_text

WHOLE = "tokenizer.json"
CONFIGURATION = "tokenizer_config.json"
RECORD = "text_tokenizer.json"
_FORMAT = "chai-text-tokenizer/1"
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_FIX = "export again"

_SAMPLES = (
    "",
    "a",
    " ",
    "Hello, world!",
    "  two spaces,\ttabs\n\nand lines \n",
    "It's 1234567.89 % of (x_1 + y) ** 2; don't you think ? Yes , I do .",
    "naïve café, Ünïcödé, 数の文字, مرحبا, हिन्दी, 👩‍👩‍👧 🙂 e\u0301 \u200b \ufeff\u00a0\ufffd",
    "def head_map(self):\n    return {'a': [1, 2], \"b\": None}  # <tag> [INST] </s> <|end|>",
    "x" * 70,
)


class TextTokenizer:
    """The part of a transformers tokenizer that running a bundle needs, with the same results.

    Args:
        directory: holds tokenizer.json.
        record: what transformers knows beside it, see :func:`describe`.
        chat_template: the template, or several by name.
    """

    def __init__(self, directory: Path, record: Mapping[str, Any], chat_template: Any) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(directory / WHOLE))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = bool(record["split_special_tokens"])
        self._special_tokens: dict[str, str] = dict(record["special_tokens"])
        self.chat_template = chat_template

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """``{"input_ids": …}`` of a text."""
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """The text of token ids, spaces as they are."""
        assert not clean_up_tokenization_spaces  # would change text that was shown before
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._id("eos_token")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str:
        """The text of a chat; see :func:`chai_export.bundle.chat_template.render`."""
        from chai_export.bundle.chat_template import render

        assert not tokenize
        return render(
            self._template(tools is not None),
            conversation,
            self._special_tokens,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )

    def _id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        found: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return found

    def _template(self, with_tools: bool) -> str:
        templates = self.chat_template
        if isinstance(templates, str):
            return templates
        if not templates:
            raise ValueError("there is no chat template")
        for name in ("tool_use",) * with_tools + ("default",):
            if name in templates:
                return str(templates[name])
        raise ValueError(
            f"there are several chat templates ({', '.join(sorted(templates))}), none is default"
        )


def read_text_tokenizer(directory: Path) -> TextTokenizer | None:
    """The tokenizer of a bundle; None where only transformers reads it rightly.

    Raises:
        ChaiError: a file cannot be read. tokenizers and json raise other things of what they cannot read.
    """
    if not (directory / RECORD).is_file():
        return None
    record = read_json(directory / RECORD, fix=_FIX)
    tokens = record.get("special_tokens")
    if (
        record.get("format") != _FORMAT
        or not isinstance(tokens, dict)
        or "split_special_tokens" not in record
    ):
        raise ChaiError(f"{directory / RECORD} is not what this version writes; {_FIX}")
    return TextTokenizer(directory, record, _chat_template(directory))


def record_text_tokenizer(directory: Path, tokenizer: Any) -> bool:
    """Write the file beside the saved ``tokenizer``, of transformers, if both give the same ids and texts.

    Returns:
        Whether they do.
    """
    record = {
        "format": _FORMAT,
        "special_tokens": {str(k): str(v) for k, v in getattr(tokenizer, "special_tokens_map", {}).items()},
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    if not (directory / WHOLE).is_file():
        return False
    try:
        own = TextTokenizer(directory, record, _chat_template(directory))
        same = _agree(own, tokenizer)
    except Exception:  # whatever a tokenizer of another kind raises
        return False
    if same:
        (directory / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return same


def _agree(own: TextTokenizer, other: Any) -> bool:
    special = list(other.special_tokens_map.values())
    samples = [*_SAMPLES, *(f"a {token}b{token} c" for token in special), "".join(special)]
    for text in samples:
        for added in (True, False):
            ids = list(other(text, add_special_tokens=added)["input_ids"])
            if own(text, add_special_tokens=added)["input_ids"] != ids:
                return False
            for skip in (True, False):
                # Windows of a text, as the detokenizer decodes it.
                for part in (ids, ids[1:], ids[len(ids) // 2 :]):
                    text_of = other.decode(part, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                    if own.decode(part, skip_special_tokens=skip) != text_of:
                        return False
    return bool(own.chat_template == other.chat_template or not (own.chat_template or other.chat_template))


def _chat_template(directory: Path) -> Any:
    """As transformers saves it: in files, or in an older configuration."""
    found = {}
    if (directory / _TEMPLATE).is_file():
        found["default"] = read_text(directory / _TEMPLATE, fix=_FIX)
    for file in sorted((directory / _MORE_TEMPLATES).glob("*.jinja")):
        found[file.stem] = read_text(file, fix=_FIX)
    if set(found) == {"default"}:
        return found["default"]
    if found:
        return found
    stated = read_json(directory / CONFIGURATION, fix=_FIX, exact=False).get("chat_template")
    if isinstance(stated, list):
        return {each["name"]: each["template"] for each in stated}
    return stated
