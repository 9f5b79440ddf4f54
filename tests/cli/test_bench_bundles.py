"""`bench generate` and `bench memory` of bundles with caches in fewer bits."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from chai_export.bench import decoders
from chai_export.runtime.pages import PAGE_LENGTH
from tests.cli.conftest import Command
from tests.helpers.tiny_graph import TinyModel

MODEL = TinyModel(positions=200, bits=(8, 4))
CODES_AND_SCALES = (8 + 2 * 2, 2 + 2 * 2)
"""Bytes of a row of keys, 8 elements in 8 bits, and of values, 4 in 4 bits, with a scale for each 4."""


def per_token(kept: int) -> int:
    key, value = CODES_AND_SCALES
    return kept * key + 2 * 4 * value


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("stored") / "b").path


def test_generate_times_both_modes_and_an_exact_bundle(command: Command, stored, tmp_path):
    exact = TinyModel(positions=200).write(tmp_path / "exact").path
    arguments = ("--prompt-tokens", 70, "--new-tokens", 3, "--rounds", 1, "--threads", 1, "--against", exact)
    outcome = command("bench", "generate", stored, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert set(result["tpot_ms"]) == set(result["ttft_ms"]) == {"chai", "chai_all_heads", "against_all_heads"}
    assert set(result["skipped"]) == {"onnxruntime_genai", "onnxruntime_genai_int8"}
    assert (result["op_version"], result["key_bits"], result["value_bits"]) == (2, [8, 8], [4, 4])
    assert result["kv_bytes_per_token"] == per_token(2 + 3)
    assert result["kv_bytes_per_token_all_heads"] == per_token(4 + 4)
    assert result["kv_bytes_per_token_float16"] == 2 * 2 * 4 * (8 + 4)


def test_memory_counts_codes_scales_and_pages(command: Command, stored):
    arguments = ("--prompt-tokens", 140, "--new-tokens", 2)
    outcome = command("bench", "memory", stored, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    tokens = -(-(140 + 1) // PAGE_LENGTH) * PAGE_LENGTH
    sizes = {mode: figures["kv_cache_bytes"] for mode, figures in outcome.json["heads"].items()}
    assert sizes == {"chai": tokens * per_token(5), "all": tokens * per_token(8)}
    shown = command("bench", "memory", stored, *arguments)
    assert f"{per_token(5) / 192:.1%} of all heads in float16" in shown.err


def test_the_int8_cache_of_genai_gets_a_scale_for_each_channel(monkeypatch, tmp_path):
    words: list[str] = []

    def build(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        words.extend(command)
        config = {"model": {"decoder": {"session_options": {}}}}
        (tmp_path / "g" / "genai_config.json").write_text(json.dumps(config))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(decoders.subprocess, "run", build)
    decoders.build_genai(tmp_path, tmp_path / "g", "float32", 1, MODEL.manifest().head_counts)
    at = words.index("--extra_options")
    assert words[at + 1] == "kv_cache_quant_scheme=int8_per_channel"
    scales = json.loads(Path(words[at + 2].removeprefix("kv_cache_scale_file=")).read_text())["scales"]
    sizes = {name: [len(layer) for layer in layers] for name, layers in scales.items()}
    assert sizes == {"k_scales": [4 * 8] * 2, "v_scales": [4 * 4] * 2}
