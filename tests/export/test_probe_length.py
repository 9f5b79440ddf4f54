"""P: measured default of calibrate, the clusters' own when exporting, the paper's where nobody says."""

from __future__ import annotations

import numpy as np
import pytest

from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.probe import probe_length
from chai_export.errors import ChaiError
from chai_export.exporter.stage import export
from chai_export.models.oracle import Oracle
from chai_export.op.probe import MEASURED_PROBE_TOKENS, PAPER_PROBE_TOKENS
from chai_export.runtime.runner import load
from tests.helpers.families import family_model

TOKENS = np.random.default_rng(0).integers(3, 96, 600).tolist()


def test_what_is_given_wins_then_what_was_calibrated_then_the_paper():
    assert probe_length(7, Clusters((1,), probe_tokens=9)) == 7
    assert probe_length(None, Clusters((1,), probe_tokens=9)) == 9
    assert probe_length(None, Clusters((1,))) == PAPER_PROBE_TOKENS == 5


@pytest.mark.parametrize(
    ("given", "clusters", "named"),
    [
        (0, Clusters((1,), probe_tokens=9), "--probe-tokens is 0"),
        (None, Clusters((1,), probe_tokens=0, origin="c.json"), r"c\.json: probe_tokens"),
    ],
)
def test_a_length_below_one_is_named(given, clusters, named):
    with pytest.raises(ChaiError, match=named):
        probe_length(given, clusters)


def test_calibrate_measures_with_the_default_and_export_runs_with_it(tmp_path):
    model = family_model("llama-mha")
    clusters = calibrate(model, TOKENS, samples=4, seq_len=32, keep="5,3")
    assert clusters.probe_tokens == MEASURED_PROBE_TOKENS
    bundle = export(model, clusters, tmp_path / "bundle")
    assert bundle.manifest.probe_tokens == MEASURED_PROBE_TOKENS
    runner, tokens = load(tmp_path / "bundle"), TOKENS[:40]
    expected = Oracle(model, (5, 3), MEASURED_PROBE_TOKENS)
    np.testing.assert_allclose(runner.logits(tokens), expected.logits(tokens), atol=1e-4)
    assert np.array_equal(runner.head_maps, expected.head_maps)
    shorter = Oracle(model, (5, 3), PAPER_PROBE_TOKENS)
    assert np.abs(shorter.logits(tokens) - expected.logits(tokens)).max() > 1e-2


def test_the_curves_and_the_damage_are_measured_with_the_probe_that_is_recorded():
    model = family_model("llama-mha")
    options = {"samples": 4, "seq_len": 40, "keep": "budget:0.2", "measure": "kl"}
    longer = calibrate(model, TOKENS, **options)
    paper = calibrate(model, TOKENS, probe_tokens=5, **options)
    assert (longer.probe_tokens, paper.probe_tokens) == (16, 5)
    assert longer.error_curves != paper.error_curves
    assert longer.kl_curves != paper.kl_curves


@pytest.mark.parametrize("prompt", [[5], list(range(3, 15)), list(range(3, 19)), list(range(3, 20))])
def test_prompts_around_the_probe_generate_what_the_oracle_does(bundle, prompt):
    model, path = bundle
    made = load(path).generate([prompt], max_new_tokens=8, ignore_eos=True)[0].token_ids
    assert made == Oracle(model, (5, 3), MEASURED_PROBE_TOKENS).greedy(prompt, 8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    model = family_model("llama-mha")
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    export(model, Clusters((5, 3), probe_tokens=MEASURED_PROBE_TOKENS), path)
    return model, path
