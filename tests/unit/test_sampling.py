"""Sampling does what transformers does, and a seed decides it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chai_export.bundle.environment import save_environment
from chai_export.bundle.manifest import GenerationSettings
from chai_export.errors import ChaiError, UsageError
from chai_export.runtime.likeliest import Likeliest
from chai_export.runtime.sampling import Sampler, SamplingSettings, candidates

TABLE = json.loads((Path(__file__).parents[1] / "data/sampling_cases.json").read_text())
"""Cases that the sampler of the C++ runner is tested with, too."""
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


def number(value: object) -> object:
    """The table's names for numbers that JSON has none for."""
    return float(value) if value in ("nan", "inf", "-inf") else value


@pytest.mark.parametrize("settings", TABLE["usable"], ids=str)
def test_settings_at_the_ends_of_their_ranges_are_taken(settings):
    SamplingSettings(**settings)
    GenerationSettings(**{name: value for name, value in settings.items() if name != "temperature"})


# What JSON and C++ cannot say, but a caller in Python can.
OF_ANOTHER_KIND = [
    {name: value}
    for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    for value in (True, "1", "0.5", b"1", [1], 1j, 10**400)
] + [{"temperature": None}, {"top_k": 2.0}, {"top_k": 0.5}, {"seed": -1}, {"seed": 1.0}, {"seed": 2**64}]


@pytest.mark.parametrize(
    "settings", [*TABLE["unusable"], *OF_ANOTHER_KIND], ids=lambda value: str(value)[:40]
)
def test_settings_out_of_range_are_refused_by_name_wherever_they_come_from(settings):
    ((name, value),) = settings.items()
    flag = name if name == "repetition_penalty" else f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=f"^{flag} is .*; give "):
        SamplingSettings(**{name: number(value)})
    if name in ("top_k", "top_p", "repetition_penalty"):
        with pytest.raises(ValidationError, match=name):
            GenerationSettings(**{name: number(value)})


def test_numbers_of_other_libraries_are_taken_for_what_they_are():
    settings = SamplingSettings(np.float16(0.1), np.int64(3), np.float32(0.5), 1, np.uint8(4))
    assert settings == SamplingSettings(float(np.float16(0.1)), 3, 0.5, 1.0, 4)
    assert {type(value) for value in vars(settings).values()} == {float, int}


@pytest.mark.parametrize("case", TABLE["choices"], ids=lambda case: case["name"])
@pytest.mark.filterwarnings("error")
def test_choices_of_the_table(case):
    logits = np.array([number(value) for value in case["logits"]], np.float32)
    sampler = Sampler(SamplingSettings(seed=0, **case["settings"]))
    chances = dict(zip(case["tokens"], case["probabilities"], strict=True))
    drawn = {sampler.choose(logits, case.get("context", [])) for _ in range(200)}
    assert {t for t, p in chances.items() if p > 0.2} <= drawn <= {t for t, p in chances.items() if p > 0}
    tokens, probabilities = sampler.distribution(logits, case.get("context", []))
    assert tokens.tolist() == case["tokens"]
    np.testing.assert_allclose(probabilities, case["probabilities"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("logits", TABLE["unusable_logits"], ids=str)
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_of_the_table_that_are_refused(logits, temperature):
    with pytest.raises(ChaiError, match="not finite"):
        Sampler(SamplingSettings(temperature)).choose(np.array([number(x) for x in logits], np.float32), [])


@pytest.mark.parametrize("bad", [{"top_k": -1}, {"top_p": 0.0}, {"repetition_penalty": float("nan")}])
def test_a_models_own_setting_that_no_sampler_can_use_is_left_out_with_a_note(bad, tmp_path, capsys):
    own = {"top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [3, "x", None, 2.0, -1]}
    settings = save_environment(tmp_path, generation_config={**own, **bad})
    ((name, _),) = bad.items()
    expected = {**own, name: None}
    assert {each: getattr(settings, each) for each in ("top_k", "top_p", "repetition_penalty")} == {
        each: expected[each] for each in ("top_k", "top_p", "repetition_penalty")
    }
    assert settings.eos_token_ids == [3]
    assert name not in json.loads((tmp_path / "generation_config.json").read_text())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"generation_config.json of the model has {name} ")


@pytest.mark.parametrize(
    "settings", [(0.0, 0), (0.0, 40), (1.0, 1), (0.7, 5), (1.3, 50), (1.0, 300)], ids=str
)
@pytest.mark.parametrize("levels", [0, 7], ids=["all different", "many equal"])
def test_the_likeliest_decide_what_all_logits_decide(settings, levels):
    """With equals at the edge, and fewer tokens than are asked for, too."""
    temperature, top_k = settings
    random = np.random.default_rng(levels)
    samplers = [Sampler(SamplingSettings(temperature, top_k, 0.9, seed=5)) for _ in range(2)]
    assert samplers[0].top is not None
    asked = 0
    for _ in range(100):
        logits = random.standard_normal(200).astype(np.float32)
        if levels:
            logits = np.floor(logits * levels) / levels
        order = np.argsort(-logits)[: samplers[0].top + 1]
        order = random.permutation(order)
        order = order[np.argsort(-logits[order], kind="stable")]  # equals in any order

        def every(logits: np.ndarray = logits) -> np.ndarray:
            nonlocal asked
            asked += 1
            return logits

        likeliest = Likeliest(order.astype(np.int64), logits[order], every)
        assert samplers[0].choose(likeliest, []) == samplers[1].choose(logits, [])
    assert (asked > 0) == (levels > 0 and samplers[0].top < 200)


def test_what_the_likeliest_do_not_decide_is_asked_for():
    assert Sampler(SamplingSettings(1.0)).top is None
    assert Sampler(SamplingSettings(0.0, repetition_penalty=1.1)).top is None
    likeliest = Likeliest(np.array([3, 1]), np.array([np.nan, 1], np.float32), lambda: np.full(4, np.nan))
    with pytest.raises(ChaiError, match="not finite"):
        Sampler(SamplingSettings()).choose(likeliest, [])
