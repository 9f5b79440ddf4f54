"""The comparison of methods on a model: equal bytes, right references, figures that mean what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from chai_export.clustering.clusters import Clusters
from chai_export.clustering.static_maps import static_head_maps
from chai_export.errors import ChaiError, UsageError
from chai_export.models.oracle import Oracle, model_logits
from chai_export.models.scoring import Scoring
from chai_export.quality.clustered_run import fixed_maps, logits_with_maps, method_maps, probe
from chai_export.quality.divergence import Divergence
from chai_export.quality.method_comparison import compare
from chai_export.quality.methods import METHODS
from tests.helpers.planted import MHA_GROUPS, distinct, planted_model

TOKENS = np.random.default_rng(7).integers(3, 128, 900).tolist()
KEPT = distinct(MHA_GROUPS)


@pytest.fixture(scope="module")
def model():
    return planted_model()


def test_planted_groups_cost_nothing_with_every_rule_and_much_at_random(model):
    keep = ",".join(map(str, KEPT))
    result = compare(model, TOKENS, keep=[keep], probe_tokens=[5], windows=3, seq_len=40)
    for row in result.results:
        assert row.kept_heads == tuple(KEPT)
        if row.method == "random":
            assert row.kl > 0.05
        else:
            assert row.kl < 1e-6, row.method
            assert row.top1_agreement > 0.99


def test_the_result_holds_every_rule_probe_length_and_method_once(model):
    result = compare(
        model, TOKENS, calibration=TOKENS, keep=["budget:0.2", "budget:0.3"],
        methods=["chai", "static", "random"], probe_tokens=[3, 6], windows=2, seq_len=24,
    )  # fmt: skip
    rows = [(row.keep, row.probe_tokens, row.method) for row in result.results]
    assert len(set(rows)) == len(rows) == 2 * (2 + 2 + 1)
    saved = {row.keep: row.kv_bytes_saved for row in result.results}
    assert saved["budget:0.2"] >= 0.2
    assert saved["budget:0.3"] >= 0.3
    assert result.tokens == 2 * 23
    for row in result.results:
        assert len(row.nll_change_by_window) == 2
        assert np.mean(row.nll_change_by_window) == pytest.approx(row.nll_change)
    assert json.loads(json.dumps(result.to_json()))["results"][0]["method"] == "chai"


def test_the_method_chai_is_the_torch_oracle(model):
    tokens = TOKENS[:30]
    kept = [3, 2, 5, 2]
    choose = method_maps(METHODS["chai"], kept, 5, seed=0)
    assert np.array_equal(logits_with_maps(model, tokens, choose, 5), Oracle(model, kept).logits(tokens))


def test_static_maps_find_the_planted_groups_and_run_as_given_maps(model):
    windows = np.asarray(TOKENS[:80], np.int32).reshape(4, 20)
    maps = static_head_maps(model, windows, KEPT)
    for letters, head_map in zip(MHA_GROUPS, maps, strict=True):
        assert "".join(letters[head] for head in head_map) == letters
    shared = logits_with_maps(model, TOKENS[:20], fixed_maps(maps), 0)
    assert np.abs(shared - model_logits(model, TOKENS[:20])).max() < 1e-4


def test_an_unmasked_probe_sees_later_tokens():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 6, 8, generator=generator) for _ in range(2))
    causal, open_probe = (probe(query, key, Scoring(0.3), 4, causal=causal) for causal in (True, False))
    assert causal.shape == open_probe.shape == (4, 4, 4)
    assert (causal[:, 0, 1:] == 0).all()
    assert (open_probe > 0).all()


def test_divergence_adds_up_whatever_the_windows():
    generator = np.random.default_rng(0)
    every, shared = (generator.normal(size=(300, 20)).astype(np.float32) for _ in range(2))
    targets = generator.integers(0, 20, 300)
    whole, parts = Divergence(), Divergence()
    whole.add(every, shared, targets)
    for start in range(0, 300, 100):
        parts.add(every[start : start + 100], shared[start : start + 100], targets[start : start + 100])
    assert parts.kl == pytest.approx(whole.kl)
    assert parts.nll == pytest.approx(whole.nll)
    assert parts.top1_agreement == whole.top1_agreement
    ranges = whole.kl_by_position
    assert [(part.first, part.last) for part in ranges][-2:] == [(128, 255), (256, 511)]
    assert sum(part.tokens for part in ranges) == 300
    assert sum(part.kl * part.tokens for part in ranges) == pytest.approx(300 * whole.kl)
    assert [part.tokens for part in parts.kl_by_position] == [3, 3, 6, 12, 24, 48, 96, 108]


def test_positions_count_from_the_start_of_the_sequence():
    logits = np.zeros((3, 5), np.float32)
    sums = Divergence()
    sums.add(logits, logits, np.zeros(3, dtype=np.int64), first_position=7)
    assert [(part.first, part.last, part.tokens) for part in sums.kl_by_position] == [(4, 7, 1), (8, 15, 2)]


def test_divergence_of_a_model_from_itself_is_nothing():
    logits = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
    sums = Divergence()
    sums.add(logits, logits, np.zeros(9, dtype=np.int64))
    assert (sums.kl, sums.perplexity_change, sums.top1_agreement) == (0.0, 0.0, 1.0)


def test_settings_that_cannot_work_are_refused(model):
    with pytest.raises(UsageError, match="--seq-len"):
        compare(model, TOKENS, probe_tokens=[32], seq_len=32)
    with pytest.raises(UsageError, match="--methods"):
        compare(model, TOKENS, methods=["best"])
    with pytest.raises(ChaiError, match="error curves"):
        compare(model, TOKENS, clusters=Clusters(kept_heads=(8, 8, 8, 8)), seq_len=20, probe_tokens=[5])
    with pytest.raises(ChaiError, match="--seq-len"):
        compare(model, TOKENS[:50], methods=["chai"], seq_len=40)
