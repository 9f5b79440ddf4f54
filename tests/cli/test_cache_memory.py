"""`run --cache-memory` bounds the pool of pages, and one line says so where that is too little."""

from __future__ import annotations

from pathlib import Path

import pytest

from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library
from chai_export.runtime.pages import PAGE_LENGTH
from tests.cli.conftest import Command
from tests.helpers.tiny_graph import TinyModel

MODEL = TinyModel(positions=400, bits=(8, 4))
PROMPTS = ("--token-ids", "5,9,7", "--token-ids", "8,20,21,6,30,4", "--token-ids", "11")
PAGE = PAGE_LENGTH * ((2 + 3) * (8 + 2 * 2) + 2 * 4 * (2 + 2 * 2))
"""Bytes of a page: codes and the scales of groups of 4, in 8 bits one and in 4 bits two float16."""

BUFFERS = 1 if find_library(ONNXRUNTIME_LIBRARY) else 2
"""The function body has one pool to read and one to write."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("stored") / "b").path


@pytest.mark.parametrize("memory", [BUFFERS * PAGE, 2 * BUFFERS * PAGE, "1GiB"])
def test_prompts_wait_for_room_and_give_the_same_texts(command: Command, stored, memory):
    free = command("run", stored, *PROMPTS, "--max-new-tokens", 9, "--json")
    bounded = command("run", stored, *PROMPTS, "--max-new-tokens", 9, "--cache-memory", memory, "--json")
    assert (free.code, bounded.code) == (0, 0), bounded.err
    assert bounded.json["results"] == free.json["results"]
    assert free.json["kv_cache_bytes"] == 3 * PAGE
    most = 3 if memory == "1GiB" else memory // BUFFERS // PAGE
    assert bounded.json["kv_cache_bytes"] == most * PAGE


@pytest.mark.parametrize(
    ("memory", "parts", "code"),
    [
        ("1KiB", ["has 3 tokens and 0 fit", "raise --cache-memory (1.0 KiB)"], 1),
        ("two", ["--cache-memory is 'two'", "2GiB"], 2),
        ("0", ["--cache-memory is '0'"], 2),
    ],
)
def test_too_little_and_no_size_are_one_line(command: Command, stored, memory, parts, code):
    outcome = command("run", stored, *PROMPTS, "--cache-memory", memory)
    assert outcome.code == code
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line
