"""Calibration: curves from text, planted answers, resuming, bad text, the plot."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from chai_export.clustering import calibrate as calibrate_module
from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.curves import ErrorCurves
from chai_export.clustering.plot import draw_curves, plot_curves
from chai_export.errors import ChaiError, UsageError
from chai_export.models.key_peaks import key_peaks
from chai_export.models.oracle import Oracle, model_logits
from chai_export.op.head_map import assign, greedy_order, quantise, squared_distances
from chai_export.report.page import _curves
from tests.helpers.families import family_model
from tests.helpers.planted import GQA_GROUPS, MHA_GROUPS, distinct, planted_model

ROOT = Path(__file__).parents[2]
TOKENS = np.random.default_rng(0).integers(3, 96, 3000).tolist()
PLANTED = [(MHA_GROUPS, 8), (GQA_GROUPS, 8), (GQA_GROUPS, 4)]


@pytest.mark.parametrize(("groups", "query_heads"), PLANTED)
def test_planted_clusters_are_found_and_cost_nothing(groups, query_heads):
    model = planted_model(groups, query_heads)
    clusters = calibrate(model, TOKENS, keep="elbow", samples=4, seq_len=64)
    assert list(clusters.kept_heads) == distinct(groups)

    tokens = TOKENS[:40]
    oracle = Oracle(model, clusters.kept_heads)
    np.testing.assert_allclose(oracle.logits(tokens), model_logits(model, tokens), atol=1e-4)
    per_group = query_heads // len(groups[0])
    for letters, head_map in zip(groups, oracle.head_maps[:, 0], strict=True):
        for head, representative in enumerate(head_map):
            assert letters[head // per_group] == letters[representative // per_group]
            assert head % per_group == representative % per_group
    # One head fewer in the layer with most distinct heads must show, or the comparison proved nothing.
    fewer = list(clusters.kept_heads)
    fewer[int(np.argmax(fewer))] -= 1
    assert np.abs(Oracle(model, fewer).logits(tokens) - model_logits(model, tokens)).max() > 1e-2


def test_curves_are_the_squared_error_of_the_greedy_choice():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((3, 8, 5, 5)).astype(np.float32)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    curves = ErrorCurves(1, 4, 8, 5)
    curves.add([probabilities])
    for kept in range(1, 5):
        error = 0
        for window in probabilities:
            distance = squared_distances(quantise(window))
            head_map = assign(distance, 4, greedy_order(distance, 4, kept)[0])
            error += distance[np.arange(8), head_map].sum()
        assert curves.normalised()[0][kept - 1] == pytest.approx(error / (3 * 8 * 5 * 1024**2))


def test_curves_never_rise_and_end_at_nothing():
    clusters = calibrate(family_model("qwen2-gqa"), TOKENS, samples=3, seq_len=32, keep="all")
    assert clusters.num_kv_heads == 2
    for curve in clusters.error_curves:
        assert len(curve) == 2
        assert all(a >= b >= 0 for a, b in itertools.pairwise(curve))
        assert curve[-1] == 0.0
    assert clusters.kept_heads == (2, 2)
    assert clusters.kv_bytes_saved == 0.0


def test_an_interrupted_calibration_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    model, state = family_model("llama-mha"), tmp_path / "state"
    options = {"samples": 12, "seq_len": 64, "keep": "budget:0.2"}
    whole = calibrate(model, TOKENS, **options)
    fed = []
    features = calibrate_module.__dict__["track"]

    def interrupted(iterable, description, total=None):
        for index in features(iterable, description, total):
            if index == 10:
                raise KeyboardInterrupt
            yield index

    monkeypatch.setattr(calibrate_module, "track", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, TOKENS, state=state, **options)
    assert state.is_file()

    def counted(iterable, description, total=None):
        for index in iterable:
            fed.append(index)
            yield index

    monkeypatch.setattr(calibrate_module, "track", counted)
    other = calibrate(family_model("llama-mha", seed=1), TOKENS, state=tmp_path / "other", **options)
    assert other != whole
    fed.clear()
    assert calibrate(model, TOKENS, state=state, **options) == whole
    assert fed == [8, 9, 10, 11]
    assert not state.exists()


@pytest.mark.parametrize("change", ["model", "text", "probe"])
def test_the_state_of_another_calibration_is_not_used(tmp_path, monkeypatch, change):
    state, options = tmp_path / "state", {"samples": 8, "seq_len": 64, "keep": "all"}
    monkeypatch.setattr(calibrate_module._Progress, "finish", lambda self: None)
    calibrate(family_model("llama-mha"), TOKENS, state=state, **options)
    assert state.is_file()
    model = family_model("llama-mha", seed=int(change == "model"))
    text = TOKENS[5:] if change == "text" else TOKENS
    probe = 6 if change == "probe" else 5
    resumed = calibrate(model, text, state=state, probe_tokens=probe, **options)
    assert resumed == calibrate(model, text, probe_tokens=probe, **options)


def test_a_damaged_state_starts_over(tmp_path):
    state = tmp_path / "state"
    state.write_text('{"format": "chai-calibration-state/1", "key": 3}')
    model, options = family_model("llama-mha"), {"samples": 2, "seq_len": 64, "keep": "elbow"}
    assert calibrate(model, TOKENS, state=state, **options) == calibrate(model, TOKENS, **options)


def test_text_that_cannot_be_used_is_named(tmp_path):
    model = ROOT / "examples" / "pydoc-5m"
    text = tmp_path / "text.txt"
    with pytest.raises(ChaiError, match=r"no text file .*text\.txt"):
        calibrate(model, text)
    text.write_text("  \n")
    with pytest.raises(ChaiError, match=r"text\.txt is empty"):
        calibrate(model, [text])
    text.write_text("a few words")
    with pytest.raises(ChaiError, match="a sequence takes 256; give more text or lower --seq-len"):
        calibrate(model, [text], keep="elbow")
    text.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ChaiError, match=r"text\.txt is not UTF-8"):
        calibrate(model, [text])
    with pytest.raises(ChaiError, match="no tokenizer"):
        calibrate(family_model("llama-mha"), "some text")


@pytest.mark.parametrize("options", [{"samples": 0}, {"probe_tokens": 0}, {"seq_len": 4}])
def test_settings_that_make_no_sense_are_wrong_usage(options):
    with pytest.raises(UsageError):
        calibrate(family_model("llama-mha"), TOKENS, **options)


def test_a_rule_that_cannot_be_met_fails_before_the_work(monkeypatch):
    monkeypatch.setattr(calibrate_module, "read_tokens", None)
    with pytest.raises(ChaiError, match="out of reach"):
        calibrate(family_model("llama-mha"), TOKENS, keep="budget:0.9")


def test_the_demo_model_shows_its_planted_groups(tmp_path):
    model = ROOT / "examples" / "pydoc-5m"
    text = ROOT / "examples" / "text" / "calibration.txt"
    clusters = calibrate(model, text, keep="elbow", samples=24)
    assert clusters.kept_heads == (16, 16, 8, 5, 4, 4)
    assert clusters.model == "pydoc-5m"
    assert clusters.kv_bytes_saved == pytest.approx(43 / 192)
    path = tmp_path / "clusters.json"
    clusters.save(path)
    again = calibrate(model, text, samples=1, keep=f"@{path}")
    assert again.kept_heads == clusters.kept_heads


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_drawn_for_any_number_of_layers(tmp_path, ending):
    curve = (1.0, 0.5, 0.2, 0.0)
    clusters = Clusters((2,) * 8, error_curves=(curve,) * 8)
    path = tmp_path / f"curves.{ending}"
    plot_curves(clusters, path)
    assert path.stat().st_size > 5000
    again = tmp_path / f"again.{ending}"
    plot_curves(clusters, again)
    if ending == "png":
        assert again.read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match=r"\.txt"):
        plot_curves(clusters, tmp_path / "curves.txt")
    with pytest.raises(ChaiError, match="no error curves"):
        plot_curves(Clusters((1,)), path)


def test_panels_have_one_scale(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    panels = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: panels.extend(figure.axes))
    curves = ((0.114, 0.05, 0.0), (0.014, 0.007, 0.0))
    draw_curves(Clusters((2, 2), error_curves=curves), tmp_path / "curves.svg", "svg")
    assert [axes.get_ylim() for axes in panels] == [(-0.04 * 0.114, 1.04 * 0.114)] * 2
    assert [axes.lines[0].get_ydata().tolist() for axes in panels] == [list(curve) for curve in curves]
    drawn = [re.findall('points="[^,]+,([^ ]+) ', panel["image"]) for panel in _curves(curves, (2, 2), "x")]
    assert [float(first) for (first,) in drawn] == [8.0, pytest.approx(62 - 54 * 0.014 / 0.114, abs=0.1)]


@pytest.mark.parametrize(("keep", "said"), [("elbow", True), ("all", False)])
def test_a_model_without_redundant_heads_is_told(capfd, keep, said):
    clusters = calibrate(family_model("llama-mha"), TOKENS, keep=keep, samples=2, seq_len=16)
    assert set(clusters.kept_heads) == {clusters.num_kv_heads}
    told = "no redundant heads found: heads will not shrink this model's cache" in capfd.readouterr().err
    assert told is said


@pytest.mark.parametrize("family", ["llama-mha", "qwen2-gqa"])
def test_peaks_of_keys_are_those_of_the_cache(family):
    model = family_model(family)
    windows = np.random.default_rng(2).integers(3, 96, (3, 20)).astype(np.int32)
    with torch.inference_mode():
        caches = [model(torch.from_numpy(w[None]).long(), use_cache=True).past_key_values for w in windows]
    expected = [
        np.max([cache.layers[layer].keys[0].abs().amax(dim=1).numpy() for cache in caches], axis=0)
        for layer in range(model.config.num_hidden_layers)
    ]
    np.testing.assert_allclose(key_peaks(model, windows), expected, rtol=1e-6)


def test_calibration_writes_the_peaks_that_its_text_has():
    clusters = calibrate(family_model("qwen2-gqa"), TOKENS, samples=3, seq_len=32, keep="all")
    layers, kv_heads, head_dim = clusters.num_layers, clusters.num_kv_heads, 8
    assert np.shape(clusters.key_peaks) == (layers, kv_heads, head_dim)
    assert np.min(clusters.key_peaks) > 0
