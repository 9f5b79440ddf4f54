"""Plans of a small model: what is measured is true, and promises are kept, checked and told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import chai_export as ce
from chai_export.clustering import planner
from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.equaliser import equaliser
from chai_export.clustering.planner import BrokenPromiseError
from chai_export.errors import ChaiError, UsageError
from chai_export.models import option_damage as damage
from chai_export.models.key_peaks import key_peaks
from chai_export.models.kv_sources import describe_model
from chai_export.models.logits import total_kl
from chai_export.models.oracle import Oracle, model_logits
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.op.heads import DecoderHeads
from tests.helpers.families import family_model
from tests.helpers.planted import distinct, planted_model

GROUPS = ("ABAACABD", "ABCDEFGA")
TOKENS = np.random.default_rng(3).integers(3, 128, 4000).astype(np.int32)
SETTINGS = {"samples": 6, "seq_len": 32, "probe_tokens": 5}
HEADS = DecoderHeads(8, 8, 8, 8, num_layers=2)


@pytest.fixture(scope="module")
def model():
    return planted_model(GROUPS)


@pytest.fixture(scope="module")
def plan(model):
    return calibrate(model, TOKENS, loss=0.05, **SETTINGS)


@pytest.mark.parametrize(
    ("kept", "key_bits", "value_bits", "layer"), [(8, 4, 16, 0), (8, 16, 4, 1), (8, 4, 4, 1), (4, 8, 4, 0)]
)
def test_damage_is_the_divergence_of_the_model_with_that_one_change(model, kept, key_bits, value_bits, layer):
    windows = TOKENS[: 12 * 40].reshape(12, 40)
    options = damage.Options((8, 4), (16, 8, 4), (16, 8, 4), 8)
    peaks = key_peaks(model, windows[:2])
    factors = {index: equaliser(found) for index, found in enumerate(peaks.tolist())}
    settings = {"probe_tokens": 5, "equalisers": factors, "sources": None}
    estimated = np.sum(
        [
            damage.option_damage(model, w, options, passes=24, seed=i, **settings)
            for i, w in enumerate(windows)
        ],
        axis=0,
    )
    place = ((8, 4).index(kept), (16, 8, 4).index(key_bits), (16, 8, 4).index(value_bits))
    bits = [[16, 16], [16, 16]]
    bits[0][layer], bits[1][layer] = key_bits, value_bits
    kept_heads = [8, 8]
    kept_heads[layer] = kept
    oracle = Oracle(
        model, kept_heads, 5, storage=CacheStorage(HEADS, Dtype.FLOAT16, *bits, 8),
        equalisers={layer: factors[layer]} if key_bits == 4 else {},
    )  # fmt: skip
    truth = sum(total_kl(model_logits(model, w), oracle.logits(w)) for w in windows)
    assert estimated[layer][place] == pytest.approx(truth, rel=0.3)


def test_redundant_heads_cost_what_their_bits_cost_and_others_more(plan):
    measured = plan.measured
    for layer, kept in enumerate(distinct(GROUPS)):
        by_kept = {heads: np.array(measured.damage[layer][i]) for i, heads in enumerate(measured.kept_heads)}
        assert by_kept[kept][0, 0] < 1e-5
        assert by_kept[kept - 1][0, 0] > 100 * by_kept[kept][0, 0]
        assert np.all(np.diff(by_kept[8], axis=0) >= 0)
        assert np.all(np.diff(by_kept[8], axis=1) >= 0)
        assert by_kept[8][2, 2] > 100 * by_kept[8][0, 0]


def test_a_plan_drops_the_redundant_heads_and_says_what_it_cost(plan):
    for kept, different in zip(plan.kept_heads, distinct(GROUPS), strict=True):
        assert kept <= different
    assert plan.checked.perplexity_ratio <= 1.05
    assert plan.checked.kl == pytest.approx(plan.expected.kl, rel=0.5)
    assert plan.checked.tokens > 500
    storage = CacheStorage(HEADS, Dtype.FLOAT16, plan.key_bits, plan.value_bits, plan.group)
    assert plan.kv_bytes_share == storage.token_bytes(plan.kept_heads).total / 512
    assert plan.forced is False


def test_more_loss_gives_a_smaller_cache_from_the_same_measurements(model, plan, monkeypatch):
    def measured_again(*arguments: object, **options: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(damage, "option_damage", measured_again)
    shares = [
        calibrate(model, TOKENS, loss=loss, known=plan, force=True, **SETTINGS).kv_bytes_share
        for loss in (0.002, 0.02, 0.2)
    ]
    assert shares[0] > shares[1] > shares[2]
    again = calibrate(model, None, check=TOKENS[-600:], loss=0.05, known=plan, force=True, **SETTINGS)
    assert again.layers == plan.layers or again.checked.tokens != plan.checked.tokens


def test_a_plan_that_was_checked_is_not_checked_again(model, plan, tmp_path, monkeypatch):
    def run_again(*arguments: object, **options: object) -> None:
        raise AssertionError("run again")

    other = calibrate(model, TOKENS, loss=0.3, known=plan, force=True, **SETTINGS)
    assert other.layers != plan.layers
    other.save(tmp_path / "plan.json")
    monkeypatch.setattr("chai_export.models.whole_plan.add_window", run_again)
    back = calibrate(model, TOKENS, loss=0.05, known=tmp_path / "plan.json", **SETTINGS)
    assert (back.layers, back.checked, back.checks) == (plan.layers, plan.checked, other.checks)
    assert len(back.checks) == 2
    settings = {**SETTINGS, "loss": 0.05, "force": True}
    with pytest.raises(AssertionError, match="run again"):
        calibrate(model, TOKENS, known=other, check=TOKENS[:900], **settings)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        kept = float(weight[7, 3])
        weight[7, 3] += 1e-3
    try:
        with pytest.raises(AssertionError, match="run again"):
            calibrate(model, TOKENS, known=other, **settings)
    finally:
        with torch.no_grad():
            weight[7, 3] = kept


@pytest.mark.parametrize("share", [0.3, 0.4, 0.6])
def test_a_plan_within_bytes_takes_no_more_and_its_sum_is_the_least(model, plan, share):
    chosen = calibrate(model, TOKENS, bytes_share=share, known=plan, **SETTINGS)
    assert chosen.kv_bytes_share <= share
    measured = chosen.measured
    table = np.array(measured.damage).reshape(2, -1)
    options = [(r, k, v) for r in measured.kept_heads for k in measured.key_bits for v in measured.value_bits]

    def size(option: tuple[int, int, int]) -> int:
        storage = CacheStorage(HEADS, Dtype.FLOAT16, [option[1]] * 2, [option[2]] * 2, plan.group)
        return storage.layer_bytes(0, option[0]).total

    sizes = np.array([size(option) for option in options])
    sums = table[0][:, None] + table[1][None, :]
    best = sums[sizes[:, None] + sizes[None, :] <= share * 512].min()
    places = [options.index((p.kept_heads, p.key_bits, p.value_bits)) for p in chosen.layers]
    assert table[0][places[0]] + table[1][places[1]] == pytest.approx(best)


def test_a_broken_promise_is_an_error_unless_forced(model, plan):
    # Believing that all damage is nothing, the planner takes the smallest cache there is.
    nothing = plan.measured.model_copy(
        update={"damage": (np.array(plan.measured.damage) * 1e-6).tolist(), "whole_plans": ()}
    )
    blind = plan.model_copy(update={"measured": nothing})
    with pytest.raises(BrokenPromiseError, match=r"raises perplexity by .* more than the 1\.00% asked for"):
        calibrate(model, TOKENS, loss=0.01, known=blind, **SETTINGS)
    forced = calibrate(model, TOKENS, loss=0.01, known=blind, force=True, **SETTINGS)
    assert forced.forced
    assert forced.checked.perplexity_ratio > 1.01
    assert "asked for loss 0.01" in forced.forced_warning()


def test_bytes_out_of_reach_name_the_least(model, plan):
    with pytest.raises(ChaiError, match=r"--bytes 0.01 is out of reach: .* take 0\.\d+ of"):
        calibrate(model, TOKENS, bytes_share=0.01, known=plan, **SETTINGS)


def test_an_interrupted_measurement_goes_on_and_ends_the_same(model, plan, tmp_path, monkeypatch):
    state = tmp_path / "plan.json.state"
    original, calls = damage.option_damage, []

    def counted(*arguments: object, **options: object) -> object:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(options["seed"])
        return original(*arguments, **options)

    monkeypatch.setattr(damage, "option_damage", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, TOKENS, loss=0.05, state=state, **SETTINGS)
    assert len(json.loads(state.read_text())["damage"]) == 2
    calls.extend([None] * 10)
    resumed = calibrate(model, TOKENS, loss=0.05, state=state, **SETTINGS)
    assert calls[12:] == [2, 3, 4, 5]
    assert resumed == plan
    assert not state.exists()


def test_the_measurement_ends_when_it_is_precise_enough(model, monkeypatch):
    monkeypatch.setattr(planner, "_PRECISE_ENOUGH", 10.0)
    found = calibrate(model, TOKENS, loss=0.05, force=True, **{**SETTINGS, "samples": 20})
    assert found.measured.windows == planner._FEWEST_WINDOWS


def test_models_with_one_kv_head_or_odd_widths_are_planned_too():
    single = planted_model(("A", "A"), query_heads=4)
    found = calibrate(single, TOKENS, loss=0.05, force=True, **SETTINGS)
    assert set(found.kept_heads) == {1}
    assert min(found.value_bits) < 16


def test_texts_too_short_are_named(model):
    with pytest.raises(ChaiError, match="give more text"):
        calibrate(model, TOKENS[:3], **SETTINGS)
    with pytest.raises(ChaiError, match="corrected has 5 tokens, 6 are the least; give more text"):
        calibrate(model, TOKENS[:30], **SETTINGS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": "all", "loss": 0.01}, "--loss exclude"),
        ({"keep": "all", "check": "text"}, "--check exclude"),
        ({"seq_len": 16}, "leaves nothing after the probe of 16 tokens"),
        ({"measure": "kl"}, "--measure kl needs a budget"),
        ({"loss": 0.01, "bytes_share": 0.5}, "give one of them"),
    ],
)
def test_settings_that_exclude_each_other_are_wrong_usage(options, reason):
    with pytest.raises(UsageError, match=reason):
        calibrate("no-such-model", "text", **options)


def test_without_text_there_is_nothing_to_measure(plan):
    with pytest.raises(UsageError, match="--text FILE"):
        calibrate("no-such-model", None, loss=0.01)
    with pytest.raises(UsageError, match="--text FILE"):
        calibrate("no-such-model", None, loss=0.01, known=plan)


def test_a_plan_of_another_model_is_refused(plan):
    with pytest.raises(ChaiError, match="2 layers, the model has 3"):
        calibrate(planted_model(("AB", "AB", "AB"), query_heads=4), TOKENS, known=plan, **SETTINGS)


def test_plans_are_public():
    assert ce.Plan is planner.Plan


def test_a_loss_out_of_reach_is_told_before_the_check(model, plan):
    with pytest.raises(ChaiError, match=r"--loss 1e-12 is out of reach"):
        calibrate(model, TOKENS, loss=1e-12, known=plan, **SETTINGS)


@pytest.mark.parametrize("name", ["gptj", "falcon-gqa", "falcon-mqa", "gpt2", "qwen2-gqa", "gemma-gqa"])
def test_every_way_to_attention_is_measured(name):
    """Attention of transformers' interface, as a method, and as a call in the middle of a layer."""
    model = family_model(name)
    geometry = describe_model(model)
    window = np.random.default_rng(0).integers(3, 96, 40).astype(np.int32)
    group = 8 if geometry.head_dim % 8 == 0 else 4
    options = damage.Options((geometry.num_kv_heads,), (0, 4), (0, 4), group)
    found = damage.option_damage(
        model, window, options, probe_tokens=5, equalisers={}, sources=None, passes=24, seed=0
    )
    assert np.all(found[:, 0, 0, 0] < 1e-9)
    bits = [4, 4]
    oracle = Oracle(
        model, geometry.all_kept, 5, storage=CacheStorage(geometry, Dtype.FLOAT32, bits, bits, group)
    )
    truth = total_kl(model_logits(model, window), oracle.logits(window))
    assert found[:, 0, 1, 1].sum() == pytest.approx(truth, rel=0.6)
    assert all(parameter.requires_grad for parameter in model.parameters())
