"""Budgets by measured divergence: what is tried, how gaps are filled, and that they beat the error curves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.keep import Budget, allocate, elbow
from chai_export.clustering.measured_budget import heads_to_try, measure_damage, predicted, spend
from chai_export.errors import UsageError
from chai_export.models.oracle import Oracle, model_logits
from chai_export.op.heads import DecoderHeads
from chai_export.quality.divergence import Divergence
from tests.helpers.planted import distinct, planted_model

GROUPS = ("ABAACABD", "ABCDEFGA")
TOKENS = np.random.default_rng(3).integers(3, 128, 600).astype(np.int32)
WINDOWS = TOKENS[:160].reshape(4, 40)


@pytest.fixture(scope="module")
def model():
    return planted_model(GROUPS)


@pytest.fixture(scope="module")
def curves(model):
    return calibrate(model, TOKENS, keep="all", samples=4, seq_len=100).error_curves


def test_both_sides_of_the_elbow_are_tried_and_no_gap_is_left_wide():
    curve = [9.0, 7.0, 5.0, 3.0, 0.001, 0.001, 0.0009, 0.0]
    assert heads_to_try(curve, 3) == [1, 4, 5]
    assert heads_to_try(curve, 99) == [1, 2, 3, 4, 5, 6, 7]
    assert heads_to_try([1.0, 0.0], 8) == [1]


def test_planted_copies_cost_nothing_and_costs_never_rise_with_kept_heads(model, curves):
    costs = measure_damage(model, WINDOWS, curves, probe_tokens=5, per_layer=4)
    for row, kept in zip(costs, distinct(GROUPS), strict=True):
        assert row[-1] == 0.0
        assert row[kept - 1] < 1e-6 < row[kept - 2]
        assert all(more <= fewer for fewer, more in itertools.pairwise(row))


def test_a_measured_budget_is_the_best_sum_of_all_allocations(model, curves):
    costs = measure_damage(model, WINDOWS, curves, probe_tokens=5, per_layer=7)
    for drop in (3, 6, 9):
        every = [kept for kept in itertools.product(range(1, 9), repeat=2) if 16 - sum(kept) == drop]
        chosen = allocate(costs, drop)
        assert predicted(costs, chosen) == pytest.approx(min(predicted(costs, kept) for kept in every))


def test_past_the_elbows_the_error_curves_have_a_say_and_before_them_none():
    steep = [9.0, 6.0, 0.05, 0.04, 0.03, 0.02, 0.01, 0.0]  # elbow 3
    gentle = [9.0, 6.0, 0.05, 0.004, 0.003, 0.002, 0.001, 0.0]  # elbow 4
    shape = DecoderHeads(8, 8, 16, 16, num_layers=2)
    assert [elbow(curve) for curve in (steep, gentle)] == [3, 4]
    # Too few sequences: the first layer seems to lose nothing past its elbow.
    damage = [[2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.5, 0.4, 0.3, 8e-4, 6e-4, 4e-4, 2e-4, 0.0]]
    few = Budget(3 / 32)
    assert few.spend(damage, shape) == (5, 8)
    assert spend(few, damage, (steep, gentle), shape) == (8, 5)
    # Nine heads lie past the elbows; what goes beyond them goes by damage alone.
    assert spend(Budget(11 / 32), damage, (steep, gentle), shape) == (3, 2)


def test_the_sum_over_layers_predicts_the_order_of_allocations(model, curves):
    """Independence of the layers is an assumption: the sum need not be right, but must rank."""
    costs = measure_damage(model, WINDOWS, curves, probe_tokens=5, per_layer=7)
    allocations = [(4, 7), (3, 7), (4, 5), (2, 7), (2, 4), (1, 3)]
    forecast = [predicted(costs, kept) for kept in allocations]
    truth = [_divergence(model, kept) for kept in allocations]
    ranks = np.argsort(np.argsort(forecast)), np.argsort(np.argsort(truth))
    assert np.corrcoef(*ranks)[0, 1] > 0.8


def test_calibrate_spends_a_budget_by_kl_and_keeps_what_it_measured(model):
    clusters = calibrate(model, TOKENS, keep="budget:0.15625", measure="kl", samples=4, seq_len=60)
    assert clusters.kept_heads == tuple(distinct(GROUPS))
    assert len(clusters.kl_curves) == 2
    assert clusters.kl_curves[0][3] < 1e-6
    assert clusters.to_json()["kl_curves"]


@pytest.mark.parametrize(("keep", "measure"), [("elbow", "kl"), ("budget:0.1", "damage")])
def test_a_measure_that_makes_no_sense_is_refused_before_work(keep, measure):
    with pytest.raises(UsageError, match="measure"):
        calibrate("no-such-model", "text", keep=keep, measure=measure)


def _divergence(model, kept):
    sums = Divergence()
    for window in WINDOWS:
        sums.add(model_logits(model, window)[:-1], Oracle(model, kept).logits(window)[:-1], window[1:])
    return sums.kl
