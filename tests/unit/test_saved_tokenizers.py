"""Tokenizer files of any content, and chat templates that do anything: one line that names the culprit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from chai_export.bundle.tokenizer import encode, load_tokenizer, render_chat
from chai_export.errors import ChaiError
from chai_export.models.tokenizer import load_tokenizer as load_of_model
from tests.helpers.tiny_graph import letters_tokenizer

MODEL = Path(__file__).parents[1] / "fixtures" / "models" / "llama-mha"
WHOLE = json.loads((MODEL / "tokenizer.json").read_text())
SETTINGS = json.loads((MODEL / "tokenizer_config.json").read_text())
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": "(["}}

CASES: dict[str, tuple[str, Any, str]] = {
    "a list": ("tokenizer.json", [], "tokenizer.json is not a JSON object"),
    "null": ("tokenizer.json", None, "tokenizer.json is not a JSON object"),
    "a number": ("tokenizer.json", 3, "tokenizer.json is not a JSON object"),
    "an empty object": ("tokenizer.json", {}, "tokenizer.json cannot be read"),
    "no model": ("tokenizer.json", {**WHOLE, "model": None}, "tokenizer.json cannot be read"),
    "a bad regex": (
        "tokenizer.json",
        {**WHOLE, "pre_tokenizer": SPLIT},
        r"tokenizer.json cannot be read \(Onig",
    ),
    "settings that are a list": ("tokenizer_config.json", [], "tokenizer_config.json is not a JSON object"),
    "a class that is a number": (
        "tokenizer_config.json",
        {**SETTINGS, "tokenizer_class": 3},
        "cannot be read",
    ),
    "a length that is text": (
        "tokenizer_config.json",
        {**SETTINGS, "model_max_length": "x"},
        "cannot be read",
    ),
    "a token that is a number": ("tokenizer_config.json", {**SETTINGS, "bos_token": 3}, "cannot be read"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.mark.parametrize("load", [load_tokenizer, load_of_model], ids=["bundle", "model"])
@pytest.mark.parametrize("case", CASES)
def test_files_of_any_content(folder: Path, case: str, load: Any) -> None:
    name, content, message = CASES[case]
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ChaiError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_tokenizer, load_of_model], ids=["bundle", "model"])
def test_a_named_pipe_is_not_waited_for(folder: Path, load: Any) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ChaiError, match=r"tokenizer.json .*(pipe|no regular file)"):
        load(folder)


TEMPLATES = {
    "unfinished": "{{",
    "an unknown tag": "{% nothing %}",
    "division by zero": "{{ 1 / 0 }}",
    "a refusal of its own": "{{ raise_exception('roles must alternate') }}",
    "what the sandbox refuses": "{{ cycler.__init__.__globals__ }}",
    "a change of what it was given": "{{ messages.append(1) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop without end": "{% for i in range(10**9) %}x{% endfor %}",
    "a name that is nothing": "{{ nothing.of.this }}",
    "a template that is a number": 3,
    "named templates without a default": {"tools": "x"},
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_that_fail(kind: str) -> None:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = TEMPLATES[kind]
    with pytest.raises(ChaiError, match=r"chat template fails \(.+\); mend it .*leave out --chat") as caught:
        render_chat(tokenizer, "hello")
    assert "\n" not in str(caught.value)
    if kind == "a refusal of its own":
        assert "roles must alternate" in str(caught.value)


def test_text_that_is_no_unicode() -> None:
    tokenizer = letters_tokenizer(chat_template="{{ '\\ud800' }}")
    for text in ("\ud800", "a\udcffb", render_chat(tokenizer, "hello")):
        with pytest.raises(ChaiError, match="half of a surrogate pair"):
            encode(tokenizer, text)
