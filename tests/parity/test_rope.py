"""Every rope type from export to logits: below and above its boundary, in mixed batches, chunks and steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.exporter.stage import export
from chai_export.models.oracle import Oracle, model_logits
from chai_export.models.rope import rope_of
from chai_export.quality.boundaries import find_boundaries
from chai_export.quality.verify import verify
from chai_export.runtime import runner as runner_module
from chai_export.runtime.request import Limits
from chai_export.runtime.runner import load
from tests.helpers.exported import scratch

ORIGINAL, CONTEXT = 24, 96
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BASE = {"rope_theta": 1000.0}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.4],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
}


def _parameters(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {**_BASE, "rope_type": kind, **more}}


_STRETCHED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", _parameters("default")),
    "linear": ("llama", _parameters("linear", factor=4.0)),
    "dynamic": ("llama", {**_parameters("dynamic", factor=4.0), "max_position_embeddings": 48}),
    "yarn": ("llama", _parameters("yarn", **_STRETCHED)),
    "llama3": ("llama", _parameters("llama3", **_STRETCHED, low_freq_factor=1.0, high_freq_factor=4.0)),
    "longrope": (
        "phi3",
        {"rope_parameters": {**_BASE, **_LONG}, "original_max_position_embeddings": ORIGINAL},
    ),
    "longrope-llama": ("llama", {"rope_parameters": {**_BASE, **_LONG}}),
    "longrope-magnitude": (
        "phimoe",
        {
            "rope_parameters": {**_BASE, **_LONG, "short_mscale": 1.1, "long_mscale": 1.4},
            "num_local_experts": 2,
            "sliding_window": None,
        },
    ),
    "partial": ("stablelm", _parameters("linear", factor=2.0, partial_rotary_factor=0.5)),
    # Families with a base per kind of layer have windows, which are refused; this one has layers without any.
    "per-layer": (
        "smollm3",
        {**_parameters("yarn", **_STRETCHED), "num_hidden_layers": 2, "no_rope_layers": [1, 0]},
    ),
}
IN_CI = ("dynamic", "longrope", "yarn")
each = pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)


@cache
def model_of(name: str) -> PreTrainedModel:
    family, options = MODELS[name]
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{**_SIZES, "dtype": "float32", **options})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # attention far from uniform: a wrong rotation shows in the logits
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


@cache
def bundle_of(name: str) -> Bundle:
    model = model_of(name)
    kept = [1] * model.config.num_hidden_layers
    return export(model, Clusters(kept), scratch() / f"rope-{name}")


def boundary(name: str) -> int:
    """The length that this type does something at, and where rows are tried on both sides."""
    rope = rope_of(model_of(name).config)
    return rope.last_length or (rope.original_lengths or (ORIGINAL,))[0]


def lengths(name: str) -> list[int]:
    at = boundary(name)
    above = [] if rope_of(model_of(name).config).last_length else [at + 1, at + 2, 2 * at]
    return [7, at - 1, at, *above]


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 64, count).tolist()


def greedy(logits: Any, prompt: list[int], count: int) -> list[int]:
    """What a fresh prefill of everything so far finds most probable, token by token."""
    made = list(prompt)
    for _ in range(count):
        made.append(int(logits(made)[-1].argmax()))
    return made[len(prompt) :]


@each
def test_fresh_rows_of_any_length_in_any_chunks_give_the_models_logits(name: str) -> None:
    runner = load(bundle_of(name).path, heads="all")
    for length in lengths(name):
        ids = tokens(length, seed=length)
        expected = model_logits(model_of(name), ids)
        cuts = [[length], [5, *[1] * (length - 5)], [5, 2, length - 7] if length > 7 else [length]]
        for chunks in cuts:
            assert np.abs(runner.logits(ids, chunks=chunks) - expected).max() < 1e-4, (length, chunks)


@each
def test_fewer_heads_give_the_oracles_logits_on_both_sides(name: str) -> None:
    runner, model = load(bundle_of(name).path), model_of(name)
    oracle = Oracle(model, [1] * model.config.num_hidden_layers)
    for length in lengths(name):
        ids = tokens(length, seed=length)
        got = runner.logits(ids, chunks=[5, *[3] * ((length - 5) // 3), *[1] * ((length - 5) % 3)])
        assert np.abs(got - oracle.logits(ids, runner.head_maps)).max() < 1e-4, length


@each
def test_rows_of_a_mixed_batch_generate_what_they_generate_alone(name: str) -> None:
    """Some rows stay below the boundary, one crosses it while it generates, one begins above."""
    runner, at = load(bundle_of(name).path, heads="all"), boundary(name)
    ends = rope_of(model_of(name).config).last_length is not None
    prompts = [tokens(n, seed=n) for n in (6, at - 3, at // 2, at - 8 if ends else at + 4)]
    made = runner.generate(prompts, max_new_tokens=8, ignore_eos=True)
    for prompt, generation in zip(prompts, made, strict=True):
        count = len(generation.token_ids)
        expected = greedy(lambda ids: model_logits(model_of(name), ids), prompt, count)
        assert generation.token_ids == expected
        assert count == 8 or (ends and len(prompt) + count == at + 1)
    (alone,) = runner.generate([prompts[1]], max_new_tokens=8, ignore_eos=True)
    assert alone.token_ids == made[1].token_ids


@pytest.mark.parametrize("name", ["longrope", "yarn"])
def test_verify_crosses_the_boundary_by_itself(name: str) -> None:
    result = verify(bundle_of(name).path, model_of(name))
    assert result.ok, result
    assert result.to_json()["boundaries"] == [{"length": ORIGINAL, "crossed": True, "reason": None}]


def test_verify_sees_a_row_that_keeps_its_keys_when_it_crosses(monkeypatch) -> None:
    monkeypatch.setattr(runner_module, "Limits", lambda *given: Limits(*given[:3]))
    result = verify(bundle_of("longrope").path, model_of("longrope"))
    assert not result.ok
    assert result.greedy_match["all"] is False


def test_a_boundary_that_is_not_crossed_says_why() -> None:
    far, ended = find_boundaries([4096], None), find_boundaries([48], 48)
    assert not far[0].crossed
    assert "longer than the 1024" in str(far[0].reason)
    assert not ended[0].crossed
    assert "ends at 48 positions" in str(ended[0].reason)


def test_a_row_that_crosses_is_what_transformers_generates() -> None:
    """transformers drops the cache of Phi-3 when a text grows past the original context."""
    prompt = tokens(ORIGINAL - 3, seed=11)
    with torch.no_grad():
        expected = model_of("longrope").generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    (made,) = load(bundle_of("longrope").path, heads="all").generate(
        [prompt], max_new_tokens=12, ignore_eos=True
    )
    assert made.token_ids == expected[0, len(prompt) :].tolist()


def test_factors_that_follow_the_length_are_said_in_the_manifest_and_end_positions_where_they_must() -> None:
    long, dynamic = bundle_of("longrope").manifest, bundle_of("dynamic").manifest
    assert long.rope is not None
    assert (long.rope.types, long.switch_lengths, long.max_positions) == (["longrope"], [ORIGINAL], None)
    assert dynamic.rope is not None
    assert (dynamic.rope.types, dynamic.rope.last_length, dynamic.max_positions) == (["dynamic"], 48, 48)
