"""Keys in 4 bits are equalised: nothing changes but what rounding costs, which gets less."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import chai_export as ce
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.equaliser import equaliser
from chai_export.errors import ChaiError
from chai_export.exporter.torch_export import export_onnx
from chai_export.models.key_peaks import key_peaks
from chai_export.models.logits import differences
from chai_export.models.oracle import model_logits
from chai_export.quality.truth import TorchTruth
from tests.helpers.families import family_model

LAYERS, GROUPS, DIM = 2, 2, 8
RNG = np.random.default_rng(5)
WINDOWS = RNG.integers(3, 96, (4, 24)).astype(np.int32)
TEXT = RNG.integers(3, 96, 40).tolist()


def uneven(factor: float):
    """llama-gqa with one rotated pair of channels ``factor`` times as large in the keys of each head."""
    model = family_model("llama-gqa")
    for layer in model.model.layers:
        for projection, by in ((layer.self_attn.k_proj, factor), (layer.self_attn.q_proj, 1 / factor)):
            rows = projection.weight.data.view(-1, DIM, projection.weight.shape[1])
            rows[:, [1, 1 + DIM // 2]] *= by
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = uneven(32.0)
    path = export_onnx(model, tmp_path_factory.mktemp("uneven"))
    return model, path, tuple(map(tuple, (map(tuple, layer) for layer in key_peaks(model, WINDOWS).tolist())))


@pytest.fixture(scope="module")
def bundles(source, tmp_path_factory):
    """Without and with the equaliser."""
    _, path, peaks = source
    folder = tmp_path_factory.mktemp("equalised")
    return [
        ce.rewrite(path, Clusters((2, 1), key_peaks=known), folder / name, key_bits=4, value_bits=8)
        for name, known in (("plain", ()), ("equalised", peaks))
    ]


def test_the_graph_divides_keys_by_what_queries_are_multiplied_by(bundles, source):
    graph = onnx.load(bundles[1].model_path).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for layer in range(LAYERS):
        key = constants[f"key_equaliser.{layer}"]
        query = constants[f"query_equaliser.{layer}"]
        assert key.shape == (GROUPS, 1, DIM)
        np.testing.assert_array_equal(query, np.repeat(key, query.shape[0] // GROUPS, axis=0))
        np.testing.assert_array_equal(key[:, 0], equaliser(source[2][layer]))
    assert not any("equalis" in node.name for node in onnx.load(bundles[0].model_path).graph.node)


@pytest.mark.parametrize("heads", ["all", "chai"])
def test_rounding_costs_less_and_nothing_else_changes(bundles, source, heads):
    plain, equalised = (ce.load(bundle.path, heads=heads) for bundle in bundles)
    without, with_it = plain.logits(TEXT), equalised.logits(TEXT)
    np.testing.assert_array_equal(plain.head_maps, equalised.head_maps)
    if heads == "all":
        exact = model_logits(source[0], TEXT)
        errors = [np.abs(logits - exact)[8:].mean() for logits in (without, with_it)]
        assert errors[1] < 0.5 * errors[0]


def test_verify_knows_what_keys_are_divided_by(bundles, source):
    for bundle in bundles:
        result = ce.verify(bundle.path, source[0], new_tokens=16)
        assert result.ok, result
    expected = TorchTruth(source[0], bundles[1]).all_heads(TEXT)
    found = differences(ce.load(bundles[0].path, heads="all").logits(TEXT), expected.logits)
    assert (found / expected.tolerances).max() > 1.0


def test_peaks_of_another_model_are_refused(source, tmp_path):
    peaks = tuple(tuple((1.0,) * 4 for _ in range(GROUPS)) for _ in range(LAYERS))
    with pytest.raises(ChaiError, match="key_peaks of layer 0 are for 2 KV heads of 4 channels"):
        ce.rewrite(source[1], Clusters((2, 1), key_peaks=peaks), tmp_path / "bundle", key_bits=4)


def test_clusters_without_peaks_are_taken_with_a_note(source, tmp_path, capsys):
    ce.rewrite(source[1], Clusters((2, 1)), tmp_path / "bundle", key_bits=4)
    assert "no peaks of keys" in capsys.readouterr().err


def test_uneven_models_are_the_models_they_were_made_of():
    """What the fixture does to keys, queries undo."""
    with torch.inference_mode():
        np.testing.assert_allclose(
            model_logits(uneven(32.0), TEXT), model_logits(family_model("llama-gqa"), TEXT), atol=2e-4
        )
