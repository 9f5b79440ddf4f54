"""The scoreboard on a model: our own methods are the oracle, figures are what they say, others are named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.equaliser import equalisers
from chai_export.clustering.plan import Plan
from chai_export.errors import ChaiError, UsageError
from chai_export.models.kv_sources import describe_model
from chai_export.models.oracle import Oracle, model_logits
from chai_export.models.whole_plan import Distance, add_logits
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.quality.scoreboard import ours
from chai_export.quality.scoreboard.catalogue import names
from chai_export.quality.scoreboard.method import float16_bytes
from chai_export.quality.scoreboard.run import Row, Scoreboard, _logits, scoreboard
from tests.helpers.planted import planted_model

TOKENS = np.random.default_rng(7).integers(3, 128, 1600).tolist()


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def plan(model) -> Plan:
    return calibrate(model, TOKENS, bytes_share=0.5, force=True, samples=4, seq_len=32)


def test_plans_and_bits_are_the_oracle_s(model, plan):
    geometry = describe_model(model)
    window = np.array(TOKENS[:70], np.int32)
    bits = ours.fixed_bits(plan, geometry, 8, 4)
    storage = CacheStorage(
        geometry, Dtype.FLOAT16, (8,) * geometry.num_layers, (4,) * geometry.num_layers, plan.group
    )
    kept = (geometry.num_kv_heads,) * geometry.num_layers
    oracle = Oracle(model, kept, plan.probe_tokens, storage=storage)
    np.testing.assert_allclose(_logits(model, window, bits), oracle.logits(window), atol=1e-4)
    assert bits.cache_bytes(10) == 10 * storage.token_bytes(kept).total

    own = ours.planned(plan, geometry, plan.kv_bytes_share)
    storage = CacheStorage(geometry, Dtype.FLOAT16, plan.key_bits, plan.value_bits, plan.group)
    factors = equalisers(plan.key_peaks, plan.key_bits)
    oracle = Oracle(model, plan.kept_heads, plan.probe_tokens, storage=storage, equalisers=factors)
    np.testing.assert_allclose(_logits(model, window, own), oracle.logits(window), atol=1e-4)
    assert own.cache_bytes(1) / float16_bytes(geometry, 1) == pytest.approx(plan.kv_bytes_share, abs=1e-4)


def test_every_method_has_a_row_or_a_reason(model, plan):
    result = scoreboard(model, TOKENS, plan=plan, windows=1, seq_len=96, shares=(0.4, 0.6))
    assert {row.method for row in result.rows} | set(result.missing) == set(names())
    assert len({(row.method, row.setting) for row in result.rows}) == len(result.rows)
    exact = {row.setting: row for row in result.rows if row.method == "bits"}
    assert exact["16/16"].bytes_share == 1.0
    assert exact["16/16"].kl < 1e-5
    assert exact["8/8"].kl < exact["4/4"].kl
    for row in result.rows:
        assert 0 < row.bytes_share <= 1.05
        assert len(row.kl_by_quarter) == 4
        assert np.mean(row.kl_by_quarter) == pytest.approx(row.kl, rel=0.1, abs=1e-6)
    plans = [row for row in result.rows if row.method == "plan"]
    assert [row.bytes_share <= share for row, share in zip(plans, (0.4, 0.6), strict=True)] == [True, True]
    data = json.loads(json.dumps(result.to_json()))
    assert len(data["at_equal_bytes"]) == 2


def test_one_kv_head_and_sizes_out_of_reach_are_told(plan):
    tiny = planted_model(groups=("A", "A"), query_heads=4)
    own = calibrate(tiny, TOKENS, bytes_share=0.5, force=True, samples=4, seq_len=32)
    result = scoreboard(tiny, TOKENS, plan=own, windows=1, seq_len=96, shares=(0.02, 0.6))
    assert "chai" not in {row.method for row in result.rows}
    assert "no keys to share" in result.missing["chai"]
    assert "no plan takes 2%" in result.missing["plan"]
    assert [row.bytes_share for row in result.rows if row.method == "plan"] == [pytest.approx(0.6, abs=0.1)]
    with pytest.raises(ChaiError, match="slim is not for this model: Slim attention needs"):
        scoreboard(tiny, TOKENS, plan=own, windows=1, seq_len=96, wanted=["slim"])


def test_a_row_is_what_its_logits_say(model, plan):
    window = np.array(TOKENS[800:896], np.int32)
    result = scoreboard(model, TOKENS, plan=plan, windows=1, seq_len=96, wanted=["kivi"])
    from chai_export.quality.scoreboard.quantised import kivi

    method = kivi(describe_model(model), 4, 8, 32)
    sums = Distance()
    add_logits(model_logits(model, window)[:-1], _logits(model, window, method)[:-1], window[1:], sums)
    row = next(row for row in result.rows if row.setting == method.setting)
    assert row.kl == pytest.approx(sums.mean_kl)
    assert row.top1_agreement == pytest.approx(sums.top1_agreement)
    assert row.perplexity_change == pytest.approx(np.expm1(sums.mean_nll_change))


def row(method: str, share: float, kl: float, on_op: bool) -> Row:
    return Row(method, f"{share:.0%}", on_op, share, 0.0, 0.0, kl, (kl,) * 4, 1.0)


def test_plans_are_judged_beside_the_best_that_takes_no_more_bytes():
    rows = (
        row("plan", 0.4, 0.02, True), row("plan", 0.3, 0.05, True), row("bits", 0.35, 0.03, True),
        row("bits", 0.39, 0.04, True), row("kivi", 0.25, 0.01, False), row("h2o", 0.41, 0.001, False),
    )  # fmt: skip
    least, most = Scoreboard("m", 1, 1, 1, rows).at_equal_bytes()
    assert (least.plan.kl, most.plan.kl) == (0.05, 0.02)
    assert least.on_op is None
    assert least.any_method == rows[4]
    assert most.on_op == rows[2]
    assert most.any_method == rows[4]


def test_settings_that_make_no_sense_are_refused(model, plan):
    for settings, message in (
        ({"wanted": ["magic"]}, "no method 'magic'; choose from plan, bits"),
        ({"windows": 0}, "--windows"),
        ({"seq_len": 8}, "--seq-len 8 is too short"),
        ({"shares": (0.0,)}, "--bytes must be shares"),
    ):
        with pytest.raises(UsageError, match=message):
            scoreboard(model, TOKENS, plan=plan, **settings)
    with pytest.raises(ChaiError, match="calibrate this model"):
        scoreboard(model, TOKENS, plan=plan.model_copy(update={"layers": plan.layers[:2]}))
