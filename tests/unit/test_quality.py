"""The gate and the evaluation, with an engine made from the oracle that can be broken on purpose."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from chai_export.bundle.choices import SourceKind
from chai_export.errors import ChaiError, UsageError
from chai_export.models.geometry import describe
from chai_export.models.logits import differences, kl_divergence, log_probabilities, total_kl
from chai_export.models.oracle import Oracle, model_logits
from chai_export.models.windows import consecutive_windows, spread_windows, start_windows
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.quality.evaluate import evaluate
from chai_export.quality.verify import verify
from tests.helpers.families import family_model

KEPT = [3, 2]
TOKENS = np.random.default_rng(5).integers(3, 96, 300).tolist()


class Engine:
    """What :class:`chai_export.runtime.runner.Runner` promises, computed by the oracle."""

    def __init__(self, model, heads, faults):
        geometry = describe(model.config)
        manifest = {name: getattr(geometry, name) for name in geometry.__dataclass_fields__}
        manifest["cache_layers"] = geometry.cache_layers
        manifest |= {
            "dtype": "float32",
            "kept_heads": KEPT,
            "probe_tokens": 5,
            "engines": {},
            "static": None,
            "weights": None,
        }
        manifest["storage"] = CacheStorage.exact(geometry, Dtype.FLOAT32)
        manifest["heads"] = lambda mode: KEPT if mode == "chai" else geometry.all_kept
        manifest |= faults.get("manifest", {})
        of_model = SimpleNamespace(switch_lengths=[], windows=None, **manifest)
        self.bundle = SimpleNamespace(manifest=of_model, path="bundle")
        self.backend, self.tokenizer = "onnxruntime", None
        self._faults = faults if heads == faults.get("heads", heads) else {}
        kept = faults.get("kept", KEPT) if heads == "chai" else [geometry.num_kv_heads] * geometry.num_layers
        self._oracle = Oracle(model, kept)

    def logits(self, token_ids):
        maps = None
        if "maps" in self._faults:
            self._oracle.logits(token_ids)
            maps = np.roll(self._oracle.head_maps, 1, axis=2)
        logits = self._oracle.logits(token_ids, maps)
        self.head_maps = self._oracle.head_maps
        if "logits" in self._faults:
            logits = logits + self._faults["logits"]
        return logits

    def generate(
        self, prompts, max_new_tokens, *, temperature=0.0, repetition_penalty=None, ignore_eos=False
    ):
        # The reference knows neither sampling nor penalties nor an end.
        assert (temperature, repetition_penalty, ignore_eos) == (0.0, 1.0, True)
        made, maps = [], []
        for prompt in prompts:
            new = []
            for _ in range(max_new_tokens):
                new.append(int(self.logits(prompt + new)[-1].argmax()))
            maps.append(self.head_maps)
            if "token" in self._faults:
                new[3] = (new[3] + 1) % 96
            made.append(SimpleNamespace(token_ids=new))
        self.head_maps = np.concatenate(maps, axis=1)
        return made


@pytest.fixture
def model():
    return family_model("llama-mha")


@pytest.fixture
def engine(monkeypatch, model):
    """Install an engine with the given faults."""

    def install(**faults):
        def load(bundle, backend, heads):
            return Engine(model, heads, faults)

        monkeypatch.setattr("chai_export.runtime.runner.load", load)

    return install


def gate(model, **options):
    return verify("bundle", model, new_tokens=6, **options)


def test_a_right_engine_passes(engine, model):
    engine()
    result = gate(model)
    assert result.ok
    assert result.prompts == 4
    report = result.to_json()
    assert report["greedy_match"] == {"all": True, "chai": True}
    assert report["head_map_agreement"] == 1.0
    assert max(report["max_abs_logit_diff"].values()) <= report["tolerance"] < 1e-4
    assert 0.0 <= max(report["tolerance_used"].values()) <= 0.5


@pytest.mark.parametrize("heads", ["all", "chai"])
def test_logits_that_are_off_fail(engine, model, heads):
    engine(heads=heads, logits=2e-4)
    result = gate(model)
    assert not result.ok
    assert result.max_abs_logit_diff[heads] == pytest.approx(2e-4, rel=0.1)
    assert gate(model, tolerance=1e-3).ok


def test_logits_that_are_not_finite_fail_and_can_be_printed(engine, model):
    engine(heads="chai", logits=np.nan)
    result = gate(model)
    assert not result.ok
    json.loads(json.dumps(result.to_json(), allow_nan=False))


@pytest.mark.parametrize("heads", ["all", "chai"])
def test_one_wrong_greedy_token_fails(engine, model, heads):
    engine(heads=heads, token=True)
    result = gate(model)
    assert not result.ok
    assert result.greedy_match == {"all": heads != "all", "chai": heads != "chai"}
    assert result.first_mismatch[heads] == {"prompt": 0, "token": 3}


def test_head_maps_of_another_rule_fail_even_if_used_faithfully(engine, model):
    engine(heads="chai", maps=True)
    result = gate(model)
    assert result.max_abs_logit_diff["chai"] < 1e-5
    assert result.head_map_agreement < 0.9
    assert not result.ok


def test_the_model_of_another_bundle_is_named(engine, model):
    engine(manifest={"num_layers": 3})
    with pytest.raises(ChaiError, match="num_layers 3 and the reference model 2"):
        gate(model)
    engine()
    assert not gate(family_model("llama-mha", seed=1)).ok


def test_quantised_weights_are_not_compared_with_a_model_that_has_others(engine, model):
    engine(manifest={"weights": "int4", "source": SimpleNamespace(kind=SourceKind.ONNX)})
    with pytest.raises(UsageError, match="has int4 weights"):
        gate(model)


def test_few_positions_shorten_the_check_or_end_it(engine, model):
    engine(manifest={"max_positions": 12})
    assert gate(model).ok
    engine(manifest={"max_positions": 1})
    with pytest.raises(ChaiError, match="too few"):
        gate(model)


def test_perplexity_agreement_and_kl_are_those_of_the_text(engine, model):
    engine()
    report = evaluate("bundle", TOKENS, window=64, prompts=2, new_tokens=9)
    oracle = Oracle(model, KEPT)
    nll, kl, agreed, count = {"all": 0.0, "chai": 0.0}, 0.0, 0, 0
    by_place = np.zeros((64, 2))
    for start in range(0, 300, 64):
        window = TOKENS[start : start + 64]
        every, chai = model_logits(model, window)[:-1], oracle.logits(window)[:-1]
        for name, logits in (("all", every), ("chai", chai)):
            p = np.exp(logits.astype(np.float64))
            p /= p.sum(-1, keepdims=True)
            nll[name] -= np.log(p[np.arange(len(p)), window[1:]]).sum()
        here = kl_divergence(log_probabilities(every), log_probabilities(chai))
        kl += here.sum()
        by_place[: len(here)] += np.stack([here, np.ones(len(here))], axis=1)
        agreed += (every.argmax(-1) == chai.argmax(-1)).sum()
        count += len(window) - 1
    assert report["tokens"] == count == 295
    for name, total in nll.items():
        assert report[name]["nll"] == pytest.approx(total / count)
        assert report[name]["perplexity"] == pytest.approx(math.exp(total / count))
    assert report["kl"] == pytest.approx(kl / count)
    assert report["kl"] > 0.01
    assert report["top1_agreement"] == pytest.approx(agreed / count)
    ranges = [(part["first"], part["last"]) for part in report["kl_by_position"]]
    assert ranges == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
    for part in report["kl_by_position"]:
        total, predictions = by_place[part["first"] : part["last"] + 1].sum(axis=0)
        assert part["tokens"] == predictions
        assert part["kl"] == pytest.approx(total / predictions, rel=1e-5, abs=1e-6)
    assert report["kl_by_position"][2]["kl"] < 1e-6 < report["kl_by_position"][4]["kl"]  # the probe is exact


def test_greedy_texts_are_followed_until_they_part(engine, model):
    engine()
    report = evaluate("bundle", TOKENS, window=64, prompts=3, new_tokens=9)
    oracle = Oracle(model, KEPT)
    starts = [TOKENS[0:32], TOKENS[128:160], TOKENS[256:278]]  # the last window has 44 tokens
    for start, found in zip(starts, report["divergence"], strict=True):
        texts = oracle.greedy(start, 9), _all_heads_text(model, start, 9)
        same = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), None)
        assert found == {"prompt_tokens": len(start), "new_tokens": 9, "first_difference": same}
    assert any(found["first_difference"] is not None for found in report["divergence"])
    assert evaluate("bundle", TOKENS, window=64, prompts=0)["divergence"] == []


def _all_heads_text(model, start, count):
    ids = list(start)
    for _ in range(count):
        ids.append(int(model_logits(model, ids)[-1].argmax()))
    return ids[len(start) :]


def test_a_reference_takes_the_place_of_all_heads(engine, model):
    engine(heads="all", logits=np.nan)
    report = evaluate("bundle", TOKENS, window=64, reference=model)
    assert math.isfinite(report["all"]["nll"])
    engine()
    own = evaluate("bundle", TOKENS, window=64)
    assert report["all"]["nll"] == pytest.approx(own["all"]["nll"], abs=1e-6)
    assert report["chai"] == own["chai"]


def test_equal_engines_agree_entirely(engine):
    engine(kept=[8, 8])
    report = evaluate("bundle", TOKENS, window=50, max_tokens=100)
    assert report["tokens"] == 98
    assert report["top1_agreement"] == 1.0
    assert report["kl"] == pytest.approx(0.0, abs=1e-9)
    assert report["all"] == report["chai"]
    assert [found["first_difference"] for found in report["divergence"]] == [None, None]


def test_windows_start_as_sequences_do():
    tokens = np.arange(10, 21, dtype=np.int32)
    assert consecutive_windows(tokens, [1], 5) == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 20]]
    assert consecutive_windows(tokens[:9], [], 4) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert spread_windows(tokens, [1], 2, 4).tolist() == [[1, 10, 11, 12], [1, 16, 17, 18]]
    starts = start_windows(tokens, [1], 1, 8, 3, 3).tolist()
    assert starts == [[[1, 10, 11], [1, 13, 14], [1, 16, 17]]]
    assert start_windows(tokens, [1, 2, 3], 9, 3, 8, 2).tolist() == [[[1, 2]] * 3] * 3


def test_settings_and_texts_that_make_no_sense(engine):
    engine(manifest={"max_positions": 100})
    wrong = ({"window": 1}, {"max_tokens": 1}, {"window": 101}, {"prompts": -1}, {"new_tokens": 0})
    for options in wrong:
        with pytest.raises(UsageError):
            evaluate("bundle", TOKENS, **options)
    with pytest.raises(ChaiError, match="too few"):
        evaluate("bundle", [5], window=50)


def test_kl_is_zero_only_for_equal_distributions():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 9)).astype(np.float32)
    log_p = log_probabilities(logits)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1.0)
    np.testing.assert_allclose(log_probabilities(logits + 3), log_p, atol=1e-6)
    assert kl_divergence(log_p, log_p).max() == 0.0
    assert kl_divergence(log_p, log_p[::-1]).min() > 0.0
    many, other = rng.standard_normal((2, 300, 9)).astype(np.float32)
    expected = kl_divergence(log_probabilities(many), log_probabilities(other)).sum()
    assert total_kl(many, other) == pytest.approx(float(expected), rel=1e-12)
    assert total_kl(many, many) == 0.0
    assert (differences(logits, logits * np.float32(np.inf)) == math.inf).all()
    assert differences(logits, logits + np.float32(1)).tolist() == pytest.approx([1.0] * 4, rel=1e-5)
