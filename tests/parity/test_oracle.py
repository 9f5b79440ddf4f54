"""The torch oracle against the NumPy reference of the op and against the unchanged models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chai_export.errors import ChaiError
from chai_export.models.attention import attention_of
from chai_export.models.geometry import describe
from chai_export.models.oracle import Oracle, clustered_attention, model_logits, probe_features
from chai_export.models.scoring import Scoring
from chai_export.op.attributes import Attributes
from chai_export.op.reference import clustered_head_attention
from tests.helpers.families import FAMILIES, family_model

PROBE = 5


def reference_layer(kept, maps, given=None, online=True):
    """A layer function that evaluates the NumPy reference on one fresh prefill."""

    def layer(index, query, key, value, scoring):
        q, k, v = (tensor.numpy() for tensor in (query, key, value))
        capacity = q.shape[2] + 3
        past_map = np.zeros((1, q.shape[1]), np.int32) if given is None else given[index]
        result = clustered_head_attention(
            q, k, v,
            np.full((1, kept[index], capacity, q.shape[3]), np.nan, np.float32),
            np.full((1, k.shape[1], capacity, v.shape[3]), np.nan, np.float32),
            None, None, np.zeros((1, 1), np.int32),
            past_map, np.zeros(1, np.int32), np.array([q.shape[2]], np.int32),
            attributes=Attributes(scoring.scale, PROBE, online),
        )  # fmt: skip
        maps.append(result.present_head_map)
        shape = (1, q.shape[2], q.shape[1], v.shape[3])
        return torch.from_numpy(result.output.reshape(shape)).transpose(1, 2)

    return layer


def tokens_for(model, count, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, count).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_all_heads_kept_equals_the_model(name):
    model = family_model(name)
    tokens = tokens_for(model, 23)
    oracle = Oracle(model, describe(model.config).all_kept)
    np.testing.assert_allclose(oracle.logits(tokens), model_logits(model, tokens), atol=2e-5)
    assert (oracle.head_maps == np.arange(model.config.num_attention_heads)).all()
    assert model.config._attn_implementation != "chai"
    assert not any("_attn" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "name", ["llama-mha", "llama-gqa", "gpt2", "qwen3-gqa", "gptj", "codegen", "falcon-gqa"]
)
@pytest.mark.parametrize("count", [1, PROBE - 1, PROBE, 23])
def test_model_with_reference_attention_gives_the_same_logits_and_maps(name, count):
    model = family_model(name)
    kept = [1, 2]
    tokens = tokens_for(model, count)
    maps = []
    with attention_of(model, reference_layer(kept, maps)), torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    oracle = Oracle(model, kept, PROBE)
    np.testing.assert_allclose(oracle.logits(tokens), expected, atol=2e-5)
    np.testing.assert_array_equal(oracle.head_maps, np.stack(maps))
    # On these random models a map matters, so the comparison above could have failed.
    if count > PROBE:
        assert np.abs(expected - model_logits(model, tokens)).max() > 1e-2


def test_injected_maps_are_used_and_the_first_tokens_stay_exact():
    model = family_model("llama-mha")
    tokens = tokens_for(model, 12)
    given = np.array([[0, 0, 0, 0, 4, 4, 4, 4], [1] * 8], np.int32)
    oracle = Oracle(model, [2, 1], PROBE)
    logits = oracle.logits(tokens, given)
    maps = []
    kept = [2, 1]
    with (
        attention_of(model, reference_layer(kept, maps, given[:, None], online=False)),
        torch.inference_mode(),
    ):
        static = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    np.testing.assert_array_equal(oracle.head_maps[:, 0], given)
    np.testing.assert_allclose(logits[:PROBE], model_logits(model, tokens)[:PROBE], atol=2e-5)
    assert np.abs(logits[PROBE:] - model_logits(model, tokens)[PROBE:]).max() > 1e-2
    np.testing.assert_allclose(
        Oracle(model, kept, PROBE, online=False).logits(tokens, given), static, atol=2e-5
    )


def test_greedy_follows_the_most_probable_token_with_the_maps_of_the_prompt():
    model = family_model("llama-gqa")
    oracle = Oracle(model, [1, 1], PROBE)
    prompt = tokens_for(model, 3)  # shorter than the probe: its own tokens complete the probe
    new = oracle.greedy(prompt, 8)
    logits = oracle.logits(prompt + new)
    assert new == logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def test_blocks_of_queries_do_not_change_a_long_sequence():
    rng = np.random.default_rng(1)
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 4, 600, 8), np.float32)) for _ in range(3))
    head_map = torch.tensor([0, 0, 2, 2])
    got = clustered_attention(q, k, v, head_map, Scoring(0.3), 5)
    future = torch.ones(600, 600, dtype=torch.bool).triu(1)
    scores = (q[:, head_map] @ k[:, head_map].transpose(2, 3) * 0.3).masked_fill(future, -torch.inf)
    torch.testing.assert_close(got[:, :, 5:], (scores.softmax(-1) @ v)[:, :, 5:], atol=1e-5, rtol=1e-4)


def test_probe_features_do_not_depend_on_what_follows_the_probe():
    model = family_model("llama-gqa")
    tokens = tokens_for(model, 30)
    features = probe_features(model, [tokens[:PROBE], tokens[10 : 10 + PROBE]], PROBE)
    assert [f.shape for f in features] == [(2, 8, PROBE, PROBE)] * 2
    seen = []

    def rule(probabilities, groups, kept):
        seen.append(probabilities)
        return np.arange(8, dtype=np.int32)

    Oracle(model, [2, 2], PROBE, rule=rule).logits(tokens)
    for feature, probabilities in zip(features, seen, strict=True):
        np.testing.assert_allclose(feature[0], probabilities, atol=1e-6)


def test_a_mask_that_is_not_causal_is_noticed(monkeypatch):
    from transformers.models.mistral import modeling_mistral

    model = family_model("mistral-mha")
    chunks = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    chunks[..., 10:, :10] = False
    monkeypatch.setattr(modeling_mistral, "create_causal_mask", lambda **_: chunks)
    with pytest.raises(ChaiError, match="layer 0: its attention mask is not causal"):
        Oracle(model, [8, 8]).logits(tokens_for(model, 20))


def test_kept_heads_that_do_not_fit_are_refused():
    model = family_model("llama-gqa")
    for kept in ([2], [3, 2], [0, 2]):
        with pytest.raises(ChaiError, match="do not fit"):
            Oracle(model, kept)
