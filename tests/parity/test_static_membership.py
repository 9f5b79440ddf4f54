"""Static membership: fixed maps, cut projections, and still exactly what the oracle says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from chai_export.bundle.manifest import read_manifest, write_manifest
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError, UsageError
from chai_export.exporter.stage import export
from chai_export.exporter.static_membership import SlicedProjection, slice_projections
from chai_export.models.logits import log_probabilities
from chai_export.models.oracle import Oracle, model_logits
from chai_export.quality.evaluate import evaluate
from chai_export.quality.verify import verify
from chai_export.runtime.runner import load
from tests.helpers.families import family_model

TEXT = np.random.default_rng(2).integers(3, 96, 2000).tolist()
TOKENS = TEXT[100:124]


@pytest.mark.parametrize(("family", "kept"), [("llama-mha", (3, 5)), ("qwen2-gqa", (1, 2))])
def test_a_static_bundle_is_the_oracle_with_fixed_maps(tmp_path, family, kept):
    model = family_model(family)
    bundle = export(model, Clusters(kept_heads=kept), tmp_path / "bundle", membership="static", text=TEXT)
    static = bundle.manifest.static
    assert static is not None
    maps = np.array(static.head_maps, np.int32)
    runner = load(tmp_path / "bundle")
    expected = Oracle(model, kept, online=False).logits(TOKENS, maps)
    assert np.abs(runner.logits(TOKENS) - expected).max() < 1e-4
    assert np.array_equal(runner.head_maps[:, 0], maps)
    assert np.abs(runner.logits(TOKENS, chunks=[9, 1, 14]) - expected).max() < 1e-4
    with pytest.raises(ChaiError, match="static membership"):
        load(tmp_path / "bundle", heads="all")


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    model = family_model("llama-mha")
    path = tmp_path_factory.mktemp("static") / "bundle"
    return model, export(model, Clusters(kept_heads=(3, 5)), path, membership="static", text=TEXT)


def test_verify_is_a_gate_for_a_static_bundle(static, tmp_path):
    model, bundle = static
    result = verify(bundle.path, model, new_tokens=8)
    assert result.ok
    assert result.max_abs_logit_diff["all"] is None
    assert result.max_abs_logit_diff["chai"] < 1e-4
    assert result.greedy_match == {"all": None, "chai": True}
    assert result.head_map_agreement == 1.0
    assert result.tokens > 0
    assert not verify(bundle.path, family_model("llama-mha", seed=1), new_tokens=8).ok
    # Maps that are not those of the manifest: the logits move away from the oracle's, and the maps differ.
    broken = Path(shutil.copytree(bundle.path, tmp_path / "broken"))
    fix_head_maps_again(broken)
    result = verify(broken, model, new_tokens=8)
    assert not result.ok
    assert result.head_map_agreement < 1.0


def fix_head_maps_again(path):
    """Exchange the maps that the manifest claims for others with the same number of kept heads."""
    manifest = read_manifest(path)
    maps = [np.roll(row, 1).tolist() for row in manifest.static.head_maps]
    write_manifest(
        path, manifest.model_copy(update={"static": manifest.static.model_copy(update={"head_maps": maps})})
    )


def test_eval_of_a_static_bundle_takes_all_heads_from_the_reference(static):
    model, bundle = static
    with pytest.raises(UsageError, match="--reference"):
        evaluate(bundle.path, TEXT[:200], window=64)
    report = evaluate(bundle.path, TEXT[:200], window=200, reference=model, prompts=1, new_tokens=4)
    maps = np.array(bundle.manifest.static.head_maps, np.int32)
    targets = TEXT[1:200]
    for heads, logits in (
        ("all", model_logits(model, TEXT[:200])),
        ("chai", Oracle(model, (3, 5), online=False).logits(TEXT[:200], maps)),
    ):
        nll = -log_probabilities(logits[:-1])[np.arange(199), targets].mean()
        assert report[heads]["nll"] == pytest.approx(nll, abs=1e-5)
    assert report["kl_by_position"][2]["kl"] > 1e-4  # unlike online, no token is exact
    assert report["divergence"][0]["new_tokens"] == 4


def test_the_projections_of_unused_heads_are_gone_and_counted():
    model = family_model("llama-mha")
    before = sum(parameter.numel() for parameter in model.parameters())
    maps = np.array([[0, 0, 2, 2, 0, 2, 0, 2], np.arange(8)], np.int32)
    saved = slice_projections(model, maps)
    assert saved.parameters_before == before
    assert saved.parameters == 2 * 6 * 8 * 64  # q and k: six heads of 8 rows, 64 columns
    assert saved.flops_per_token == 2 * saved.parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == before - saved.parameters


def test_a_cut_projection_copies_the_heads_it_keeps():
    linear = torch.nn.Linear(5, 12)
    cut = SlicedProjection(linear, np.array([0, 2, 2, 0]), 3)
    hidden = torch.randn(2, 5)
    whole = linear(hidden).view(2, 4, 3)
    assert torch.allclose(cut(hidden).view(2, 4, 3), whole[:, [0, 2, 2, 0]], atol=1e-6)
    assert cut.weight.shape == (6, 5)


def test_models_that_cannot_be_cut_are_refused():
    maps = np.zeros((2, 8), np.int32)
    with pytest.raises(ChaiError, match="one projection"):
        slice_projections(family_model("gpt2"), maps)
    with pytest.raises(ChaiError, match="depend on each other"):
        slice_projections(family_model("olmo2-gqa"), maps)


def test_static_membership_needs_a_text(tmp_path):
    with pytest.raises(UsageError, match="--text"):
        export(family_model("llama-mha"), Clusters(kept_heads=(3, 5)), tmp_path / "b", membership="static")
