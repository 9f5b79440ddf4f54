"""Sampling does what transformers does, and a seed decides it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chai_export.errors import ChaiError, UsageError
from chai_export.runtime.sampling import Sampler, SamplingSettings, candidates

LOGITS = (np.random.default_rng(3).standard_normal(200) * 2).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (20, 0.8), (500, 0.05)])
def test_candidates_and_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = (
        processors(torch.zeros(1, 1, dtype=torch.long), torch.tensor(LOGITS)[None]).softmax(-1)[0].numpy()
    )
    tokens, probabilities = candidates(LOGITS, SamplingSettings(temperature, top_k, top_p))
    assert tokens.tolist() == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(probabilities, expected[tokens], rtol=2e-5)


def test_tokens_that_tie_with_the_kth_stay():
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    assert candidates(logits, SamplingSettings(1.0, top_k=2))[0].tolist() == [1, 2, 3]


def test_temperature_zero_is_the_likeliest_token():
    assert Sampler(SamplingSettings()).choose(LOGITS, []) == LOGITS.argmax()


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    seen = [3, 5, 5, int(LOGITS.argmax())]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([seen]), torch.tensor(LOGITS)[None])[0]
    assert Sampler(SamplingSettings(repetition_penalty=penalty)).choose(LOGITS, seen) == int(
        expected.argmax()
    )


def test_a_seed_decides_the_choices():
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingSettings(1.0, seed=seed))
        return [sampler.choose(LOGITS, []) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_choices_follow_the_probabilities():
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    sampler = Sampler(SamplingSettings(1.0, seed=0))
    counts = np.bincount([sampler.choose(logits, []) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.6, 0.3], atol=0.03)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ChaiError, match="not finite"):
        Sampler(SamplingSettings()).choose(np.array([0, bad], np.float32), [])


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"seed": -1}, "--seed"),
        ({"repetition_penalty": 0.0}, "repetition penalty"),
    ],
)
def test_values_out_of_range_name_their_flag(wrong, flag):
    with pytest.raises(UsageError, match=flag):
        SamplingSettings(**wrong)
