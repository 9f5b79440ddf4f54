"""Sliding windows in torch: told by configurations, seen in masks, and the same in both."""

from __future__ import annotations

import pytest
import torch

from chai_export.errors import ChaiError
from chai_export.models.attention import attention_of
from chai_export.models.geometry import describe
from chai_export.models.oracle import Oracle, require_same_with_all_heads
from chai_export.models.scoring import Scoring
from chai_export.models.sliding import layer_kinds, window_of
from chai_export.models.support import unsupported_reasons
from tests.helpers.families import FAMILIES, family_config, family_model

WINDOWS = [name for name in FAMILIES if name.endswith("-window")]
TOKENS = torch.arange(3, 23)[None]


def scorings(model, tokens: torch.Tensor = TOKENS) -> list[Scoring]:
    found = []

    def layer(index, query, key, value, scoring):
        found.append(scoring)
        return value.float().repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    with attention_of(model, layer), torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    return found


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_no_limit_and_the_oracle_has_it(name):
    model = family_model(name)
    assert window_of(model.config) == 6
    assert unsupported_reasons(model.config) == []
    assert describe(model.config).max_positions is None
    require_same_with_all_heads(model)


@pytest.mark.parametrize("name", WINDOWS)
def test_each_layer_has_the_window_of_its_kind(name):
    model = family_model(name)
    expected = [6 if kind == "sliding_attention" else 0 for kind in layer_kinds(model.config)]
    assert [scoring.window for scoring in scorings(model)] == expected
    assert 6 in expected


def test_a_window_that_is_told_and_not_masked_is_noticed(monkeypatch):
    from transformers.models.mistral import modeling_mistral

    model = family_model("mistral-window")
    monkeypatch.setattr(
        modeling_mistral, "create_sliding_window_causal_mask", modeling_mistral.create_causal_mask
    )
    with pytest.raises(ChaiError, match="layer 0: it is said to see 6 tokens and its mask shows it 20"):
        scorings(model)
    assert [scoring.window for scoring in scorings(model, TOKENS[:, :6])] == [6, 6]


def test_a_window_that_is_masked_and_not_told_is_taken(monkeypatch):
    from transformers.models.mistral import modeling_mistral

    model = family_model("mistral-window")
    forward = modeling_mistral.MistralAttention.forward

    def untold(self, *args, **kwargs):
        window, self.config.sliding_window = self.config.sliding_window, None
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config.sliding_window = window

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", untold)
    assert [scoring.window for scoring in scorings(model)] == [6, 6]
    assert [scoring.window for scoring in scorings(model, TOKENS[:, :6])] == [0, 0]


def test_soft_caps_and_sinks_are_the_models_own():
    capped = scorings(family_model("gemma2"))
    assert [(scoring.softcap, scoring.window, scoring.sinks) for scoring in capped] == [
        (2.0, 6, None), (2.0, 0, None)
    ]  # fmt: skip
    model = family_model("gpt_oss")
    for scoring, layer in zip(scorings(model), model.model.layers, strict=True):
        assert scoring.sinks is layer.self_attn.sinks


def test_fewer_heads_are_chosen_and_used_with_the_window():
    """The same model without its window gives other logits, and so it does with heads shared."""
    model = family_model("mistral-window")
    tokens = TOKENS[0].tolist()
    windowed = Oracle(model, [2, 2]).logits(tokens)
    plain = family_model("mistral-window", sliding_window=None)
    whole = Oracle(plain, [2, 2]).logits(tokens)
    assert abs(windowed[:6] - whole[:6]).max() < 1e-5
    assert abs(windowed[7:] - whole[7:]).max() > 1e-2


def test_layer_kinds_without_a_list_are_one():
    config = family_config("mistral-window")
    assert layer_kinds(config) == ["sliding_attention"] * 2
    assert layer_kinds(family_config("mistral-gqa")) == []
