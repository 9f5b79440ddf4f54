"""Chat templates without transformers: equal to what transformers renders, and as closed to what it refuses.

The templates lie in tests/data/chat_templates, written in the manner of the families they are named after.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from chai_export.bundle.chat_template import render
from tests.helpers.tiny_graph import letters_tokenizer

TEMPLATES = sorted((Path(__file__).parents[1] / "data" / "chat_templates").glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "<é>"]}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <numbers> & \"more\".",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "number"},
                "b": {"type": "array", "items": {"type": ["string", "null"]}},
            },
            "required": ["a"],
        },
    },
}  # fmt: skip
USER = {"role": "user", "content": " What is 1 + 1?\n\nSay it <briefly>. "}
ANSWER = {"role": "assistant", "content": "\n2, naïvely 数"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "several turns": [USER, ANSWER, {"role": "user", "content": "And 2 + 2?"}],
    "system": [{"role": "system", "content": "Be <kind>."}, USER, ANSWER, USER],
    "calls": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
    ],
    "reasoning": [USER, {**ANSWER, "reasoning": "1 and 1\nis 2"}, USER],
    "nothing said": [USER, {**ANSWER, "tool_calls": None, "name": None}],
    "blocks": [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = letters_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = SPECIAL.values()
    return tokenizer


def outcome(rendering: Any) -> tuple[str, str]:
    try:
        return "text", rendering()
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_equal_to_transformers(template: Path, tokenizer: Any) -> None:
    text = template.read_text(encoding="utf-8")
    special = tokenizer.special_tokens_map
    texts = 0
    for chat in CHATS.values():
        for tools in (None, [TOOL], []):
            for prompt in (True, False):
                options = {"tools": tools, "add_generation_prompt": prompt}
                theirs = outcome(
                    lambda chat=chat, options=options: tokenizer.apply_chat_template(
                        chat, chat_template=text, tokenize=False, **options
                    )
                )
                ours = outcome(lambda chat=chat, options=options: render(text, chat, special, **options))
                assert ours == theirs
                texts += theirs[0] == "text"
    assert texts >= 6, "hardly any chat fits this template"


def test_thirty_families() -> None:
    assert len(TEMPLATES) >= 30


CLOSED = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace(_hidden=1) %}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ lipsum.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% include 'x' %}",
    "{% for %}",
    "{{ raise_exception('no') }}",
    "{{ 1 // 0 }}",
    "{{ undefined_thing.attribute }}",
]


@pytest.mark.parametrize("template", CLOSED)
def test_refused_as_by_transformers(template: str, tokenizer: Any) -> None:
    kind, said = outcome(
        lambda: tokenizer.apply_chat_template([USER], chat_template=template, tokenize=False)
    )
    ours = outcome(lambda: render(template, [USER], {}))
    assert ours[0] == kind
    if kind == "text":  # a reference that the sandbox makes undefined
        assert ours[1] == said
    else:
        assert ours[1].split(":")[0] == said.split(":")[0]


def test_a_template_gets_plain_data_only() -> None:
    secret = SimpleNamespace(content="x")
    assert render("{{ messages[0].thing }}", [{"role": "user", "thing": secret}], {}) == "<SimpleNamespace>"
    flags = {"role": "user", "yes": True, "n": 3, "f": 0.5, "pair": (1, 2)}
    assert render("{{ messages[0] | tojson }}", [flags], {}).startswith(
        '{"role": "user", "yes": true, "n": 3'
    )


def test_no_turns_are_no_chat() -> None:
    with pytest.raises(ValueError, match="no messages"):
        render("x", [], {})


def test_a_year_and_a_namespace_called_self() -> None:
    assert render("{{ strftime_now('%Y') | int > 2000 }}", [USER], {}) == "True"
    assert render("{% set ns = namespace(self=4) %}{{ ns.self }}", [USER], {}) == "4"
    with pytest.raises(jinja2.exceptions.TemplateError, match="no more"):
        render("{{ raise_exception('no more') }}", [USER], {})
