"""What rounding allows: right computations stay inside, other meanings do not, sensitive places get room."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from chai_export.models.loading import load_model
from chai_export.models.logits import differences
from chai_export.models.oracle import model_logits
from chai_export.quality.rounding import ALLOWANCE, rounding, tolerances
from tests.helpers.families import family_model

DEMO = Path(__file__).parents[2] / "examples" / "pydoc-5m"
TOKENS = np.random.default_rng(0).integers(3, 96, 48).tolist()


def used(model: PreTrainedModel, dtype: str, other: np.ndarray) -> float:
    """The largest difference of other logits from the model's, in units of what is allowed there."""
    plain = model_logits(model, TOKENS)
    with rounding(model, dtype):
        allowed = tolerances(plain, model_logits(model, TOKENS))
    return float((differences(other, plain) / allowed).max())


def rounded_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return copy.deepcopy(model).to(dtype).float()


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    return load_model(DEMO)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-mqa", "gemma-gqa", "demo"])
def test_the_same_model_in_another_precision_is_allowed(name: str, demo: PreTrainedModel) -> None:
    model = demo if name == "demo" else family_model(name)
    exact = model_logits(copy.deepcopy(model).double(), TOKENS)
    assert used(model, "float32", exact) <= 0.5
    for dtype in (torch.float16, torch.bfloat16):
        low = copy.deepcopy(model).to(dtype)
        assert used(rounded_weights(model, dtype), str(dtype)[6:], model_logits(low, TOKENS)) <= 0.75


def test_the_bound_follows_the_logits_scale_and_the_dtype(demo: PreTrainedModel) -> None:
    def bound(model: PreTrainedModel, dtype: str) -> float:
        plain = model_logits(model, TOKENS)
        with rounding(model, dtype):
            return float(np.median(tolerances(plain, model_logits(model, TOKENS))))

    louder = copy.deepcopy(demo)
    with torch.no_grad():
        louder.model.norm.weight.mul_(16.0)
    assert bound(louder, "float32") == pytest.approx(16 * bound(demo, "float32"), rel=1e-3)
    assert 200 < bound(demo, "float16") / bound(demo, "float32") < 20000
    assert 4 < bound(demo, "bfloat16") / bound(demo, "float16") < 16


def test_a_sensitive_position_gets_its_own_room_and_a_lucky_one_the_median() -> None:
    plain = np.ones((4, 3), np.float32)
    rounded = plain + np.array([[1e-3], [1e-3], [0.5], [0.0]], np.float32)
    np.testing.assert_allclose(
        tolerances(plain, rounded), ALLOWANCE * np.array([1e-3, 1e-3, 0.5, 1e-3]), rtol=1e-3
    )
    floor = tolerances(plain * 64, plain * 64)
    np.testing.assert_allclose(floor, ALLOWANCE * 64 * 2.0**-23)


def test_rounding_is_the_same_each_time_and_leaves_the_model_as_it_was(demo: PreTrainedModel) -> None:
    plain = model_logits(demo, TOKENS)
    with rounding(demo, "float32"):
        first, second = model_logits(demo, TOKENS), model_logits(demo, TOKENS)
    assert (first == second).all()
    assert (first != plain).any()
    assert (model_logits(demo, TOKENS) == plain).all()


def test_activations_beyond_float16_do_not_make_the_bound_infinite(demo: PreTrainedModel) -> None:
    loud = copy.deepcopy(demo)
    with torch.no_grad():
        loud.model.norm.weight.mul_(1e6)
    plain = model_logits(loud, TOKENS)
    with rounding(loud, "float16"):
        assert np.isfinite(tolerances(plain, model_logits(loud, TOKENS))).all()


def scaled_scores(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.01


def other_norm_epsilon(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon *= 2


def values_of_other_heads(model: PreTrainedModel) -> None:
    weight = model.model.layers[-1].self_attn.v_proj.weight
    size = model.config.hidden_size // model.config.num_attention_heads
    weight[: 2 * size] = torch.cat([weight[size : 2 * size], weight[:size]])


def one_frequency_off(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq[-1] *= 1.1


MUTATIONS = [scaled_scores, other_norm_epsilon, values_of_other_heads, one_frequency_off]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_another_meaning_is_not_allowed(mutate, demo: PreTrainedModel) -> None:
    other = copy.deepcopy(demo)
    with torch.no_grad():
        mutate(other)
    assert used(demo, "float32", model_logits(other, TOKENS)) > 2.0
