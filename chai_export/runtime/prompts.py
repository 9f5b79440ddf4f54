"""Prompts: from files, and from text to token ids as transformers makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chai_export.arguments import shown, whole_numbers
from chai_export.bundle.tokenizer import encode, render_chat
from chai_export.errors import ChaiError, UsageError
from chai_export.files import parse_json, read_text

Prompt = str | Sequence[int]
_JSON_LINES = {".jsonl", ".ndjson"}


def read_prompt_file(path: Path) -> list[str | list[int]]:
    """Prompts of a UTF-8 file: one a line, or JSON lines. Empty lines are passed over.

    It is read as JSON lines if its name ends in .jsonl or .ndjson or its first line begins with ``{``. A JSON
    line is a string, a list of token ids, or an object with ``prompt`` or ``token_ids``.

    Raises:
        ChaiError: the file cannot be read, holds no prompt, or a line is not as described.
    """
    text = read_text(path, fix="check --prompt-file")
    # Not splitlines(): a prompt may hold a form feed or another separator that is none to a text editor.
    lines = [(n, line.rstrip("\r")) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ChaiError(f"{path} holds no prompt; write one a line")
    if path.suffix.lower() in _JSON_LINES or lines[0][1].lstrip().startswith("{"):
        return [_json_prompt(line, f"{path} line {number}") for number, line in lines]
    return [line for _, line in lines]


def _json_prompt(line: str, where: str) -> str | list[int]:
    content = parse_json(line, where, fix="write one JSON value a line")
    if isinstance(content, dict):
        content = content.get("prompt", content.get("token_ids"))
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in content):
        return content
    raise ChaiError(f'{where} holds no prompt; write a string, {{"prompt": "…"}} or {{"token_ids": [1, 2]}}')


def encode_prompt(
    prompt: Prompt, tokenizer: Any | None, vocab_size: int, *, chat: bool, name: str = "a prompt"
) -> list[int]:
    """Token ids of one prompt; ids are taken as they are. ``chat`` makes text a user's turn of a chat.

    Raises:
        UsageError: it is neither a text nor a list of ids; ``name`` says which prompt.
        ChaiError: there is no tokenizer or chat template for it, it has no tokens, or an id is out of range.
    """
    if isinstance(prompt, str):
        ids = _encode_text(prompt, tokenizer, chat=chat)
    else:
        ids = whole_numbers(prompt, name)
    if not ids:
        raise ChaiError("a prompt is empty; give it at least one token (this tokenizer adds none of its own)")
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ChaiError(
            f"token id {wrong} is not in the model's vocabulary of {vocab_size}; check the prompt's ids"
        )
    return ids


def _encode_text(text: str, tokenizer: Any | None, *, chat: bool) -> list[int]:
    if tokenizer is None:
        raise ChaiError(
            "the bundle has no tokenizer; give --token-ids, or make it again with --tokenizer (rewrite)"
        )
    if not chat:
        return encode(tokenizer, text)
    # The template writes special tokens itself, as transformers assumes when it tokenizes a chat.
    return encode(tokenizer, render_chat(tokenizer, text), add_special_tokens=False)


def require_fits(prompt_tokens: int, limit: int, flag: str) -> None:
    """Raise unless a prompt of ``prompt_tokens`` fits ``limit`` positions, which ``flag`` explains.

    Raises:
        ChaiError: it does not fit.
    """
    if prompt_tokens > limit:
        raise ChaiError(f"a prompt has {prompt_tokens} tokens and {limit} fit; {flag}")


def require_stops_possible(stop: Sequence[str], tokenizer: Any | None) -> None:
    """Raise UsageError unless ``stop`` holds texts, and if there are some where no text is made."""
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise UsageError(f"stop is {shown(stop)}; give a list of texts")
    for text in stop:
        if not isinstance(text, str):
            raise UsageError(f"stop holds {shown(text)}; give texts")
    if stop and tokenizer is None:
        raise UsageError("--stop needs text, and the bundle has no tokenizer; leave it out")
