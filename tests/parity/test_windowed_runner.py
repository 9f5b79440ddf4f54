"""Bundles of models with windows, soft caps and sinks on the runner: texts as transformers writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from chai_export.quality.verify import verify
from chai_export.runtime.runner import load
from tests.helpers.exported import bundle_of, model_of

WINDOW = 6
each = pytest.mark.parametrize(
    "name",
    ["gemma2", "gpt_oss", pytest.param("mistral-window", marks=pytest.mark.slow),
     pytest.param("gemma3-window", marks=pytest.mark.slow)],
)  # fmt: skip


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 96, length).tolist()


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """By transformers with its own cache, which drops what a window has passed."""
    cache = DynamicCache(config=model.config)
    made: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            new = torch.tensor([[made[-1]] if made else prompt])
            made.append(int(model(input_ids=new, past_key_values=cache).logits[0, -1].argmax()))
    return made


@each
def test_64_tokens_past_the_window_are_those_of_transformers(name: str) -> None:
    prompts = [prompt_of(length) for length in (2, WINDOW, WINDOW + 5, 3 * WINDOW)]
    made = load(bundle_of(name).path, heads="all").generate(prompts, max_new_tokens=64, ignore_eos=True)
    for prompt, generation in zip(prompts, made, strict=True):
        assert generation.token_ids == greedy(model_of(name), prompt, 64)


@each
def test_verify_crosses_the_window_by_itself(name: str) -> None:
    result = verify(bundle_of(name).path, model_of(name), new_tokens=8)
    assert result.ok, result
    crossed = {"length": WINDOW, "crossed": True, "reason": None}
    assert crossed in result.to_json()["boundaries"]
