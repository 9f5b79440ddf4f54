"""Every supported family: exported, rewritten and run, against the Hugging Face model and the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chai_export.models.oracle import Oracle
from tests.helpers.exported import bundle_of, kept_of, model_of
from tests.helpers.families import GRAPHS_IN_CI, each_family
from tests.helpers.graph_runner import GraphRunner

PROMPTS = ([5, 11, 7, 90, 3, 3, 64, 21, 8], [17, 2, 40, 33, 9, 71], [80, 12])
TOLERANCE = 1e-4


def hf_logits(name: str, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model_of(name)(input_ids=torch.tensor([tokens])).logits[0].float().numpy()


@pytest.mark.parametrize("name", each_family(GRAPHS_IN_CI))
def test_all_heads_equal_the_model_in_prefill_decode_and_padded_batches(name: str) -> None:
    runner = GraphRunner(bundle_of(name), batch=len(PROMPTS), capacity=16)
    logits = runner.step(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(logits[row, : len(prompt)], hf_logits(name, prompt), atol=TOLERANCE)
    texts = [list(prompt) for prompt in PROMPTS]
    # A chunk with an inactive row, then single tokens: every row is at another position.
    for chunk in ([[1, 2, 3], [4], []], [[10], [20], [30]], [[11], [21], [31]]):
        logits = runner.step(chunk)
        for row, new in enumerate(chunk):
            texts[row] += new
            if new:
                expected = hf_logits(name, texts[row])[-len(new) :]
                np.testing.assert_allclose(logits[row, : len(new)], expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", each_family(GRAPHS_IN_CI))
def test_fewer_heads_equal_the_oracle_with_the_same_maps(name: str) -> None:
    runner = GraphRunner(bundle_of(name), batch=1, capacity=16, heads="chai")
    tokens = list(PROMPTS[0])
    got = [runner.step([tokens])[0]]
    maps = runner.head_map
    for token in (44, 13):
        tokens.append(token)
        got.append(runner.step([[token]])[0])
    oracle = Oracle(model_of(name), kept_of(name))
    expected = oracle.logits(tokens)
    np.testing.assert_array_equal(maps, oracle.head_maps)
    np.testing.assert_array_equal(runner.head_map, maps)
    np.testing.assert_allclose(np.concatenate(got), expected, atol=TOLERANCE)


def test_only_the_wanted_positions_get_logits() -> None:
    bundle = bundle_of("llama-gqa")
    every = GraphRunner(bundle, 2, 16).step(PROMPTS[:2])
    last = GraphRunner(bundle, 2, 16).step(PROMPTS[:2], np.array([[8, 0], [5, 2]]))
    assert last.shape[1] == 2
    np.testing.assert_allclose(last[0], every[0, [8, 0]], atol=1e-6)
    np.testing.assert_allclose(last[1], every[1, [5, 2]], atol=1e-6)


@pytest.mark.parametrize(("name", "rows"), [("gpt2", 128), ("opt", 128), ("llama-gqa", None)])
def test_a_position_table_limits_the_length(name: str, rows: int | None) -> None:
    assert bundle_of(name).manifest.max_positions == rows


def test_padding_never_reads_past_the_position_table() -> None:
    runner = GraphRunner(bundle_of("gpt2"), batch=2, capacity=160)
    long = [7] * 128
    runner.step([long[:120], [7]])
    # Row 0 has 8 positions left, row 1 makes the batch 100 wide.
    logits = runner.step([long[120:], long[:100]])
    np.testing.assert_allclose(logits[0, :8], hf_logits("gpt2", long)[-8:], atol=TOLERANCE)
