"""Graphs with integer weights: matched, proven with exact activations, and called what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph.prove.exact_activations import exact_activations, quantises_activations
from chai_export.graph.prove.segments import run_in_segments
from chai_export.graph.read.load import load_graph
from chai_export.graph.read.quantised_weights import quantised_weights
from chai_export.graph.stage import rewrite
from tests.helpers.onnx_fixtures import ALL, REWRITTEN, Fixture

TORCH, EAGER, OPTIMUM = (
    "A-torch-2.13.0-opset18-sdpa-gqa",
    "B-torch-2.13.0-opset18-eager-mha",
    "F-optimum-0.1.0-gqa",
)
INT4 = [fixture for fixture in REWRITTEN if fixture.quantised]
WAYS = {
    "int8": {},
    "uint8": {"weight_type": QuantType.QUInt8},
    "per channel": {"per_channel": True, "reduce_range": True},
}


def fixture_of(name: str) -> Fixture:
    return next(fixture for fixture in ALL if fixture.name == name)


def clusters_of(name: str) -> Clusters:
    fixture = fixture_of(name)
    return Clusters(tuple([max(1, fixture.kv_heads // 2)] * fixture.layers))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory):
    """quantize_dynamic's file of a fixture, made once for each way."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str = TORCH, way: str = "int8") -> Path:
        if (name, way) not in made:
            path = tmp_path_factory.mktemp("quantised") / "model.onnx"
            quantize_dynamic(fixture_of(name).path / "model.onnx", path, **WAYS[way])
            made[name, way] = path
        return made[name, way]

    return make


def feeds(model: ir.Model, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """A prompt of each row after an empty past."""
    batch, tokens = len(rows), len(rows[0])
    values = {
        "input_ids": np.array(rows),
        "attention_mask": np.ones((batch, tokens), np.int64),
        "position_ids": np.broadcast_to(np.arange(tokens), (batch, tokens)).copy(),
    }
    for value in model.graph.inputs:
        if "past" in value.name:
            values[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
    return {value.name: values[value.name] for value in model.graph.inputs}


@pytest.mark.parametrize(("name", "way"), [(TORCH, "int8"), (EAGER, "per channel"), (OPTIMUM, "uint8")])
def test_a_dynamically_quantised_file_becomes_a_proven_bundle(quantised, name, way, tmp_path) -> None:
    bundle = rewrite(quantised(name, way), clusters_of(name), tmp_path / "bundle")
    manifest = bundle.manifest
    assert (manifest.weights, manifest.weight_type, manifest.dtype) == ("int8", "int8", "float32")
    assert "activations exact" in manifest.proof.compared
    assert manifest.proof.max_abs_diff <= 1e-5
    # What runs is quantised as the source is: only the comparison was exact.
    assert quantises_activations(ir.load(bundle.model_path).graph)


@pytest.mark.parametrize("fixture", INT4, ids=lambda fixture: fixture.name)
def test_an_int4_bundle_says_so_and_keeps_its_accuracy_level(fixture, tmp_path) -> None:
    source = onnx.load(fixture.path / "model.onnx", load_external_data=False)
    bundle = rewrite(fixture.path, clusters_of(fixture.name), tmp_path / "bundle")
    assert bundle.manifest.weights == "int4"

    def levels(model: onnx.ModelProto) -> list[int]:
        nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        return [a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"]

    assert levels(onnx.load(bundle.model_path, load_external_data=False)) == levels(source)


def test_float_weights_are_not_called_quantised() -> None:
    graph = load_graph(fixture_of(TORCH).path).graph
    assert quantised_weights(graph) is None
    assert not quantises_activations(graph)


def test_exact_activations_make_a_row_independent_of_its_batch(quantised) -> None:
    generator = np.random.default_rng(0)
    row, other = generator.integers(3, 60, (2, 12)).tolist()
    model = load_graph(quantised())
    assert quantises_activations(model.graph)

    def spread() -> float:
        cases = [feeds(model, [row]), feeds(model, [row, other])]
        alone, together = (result["logits"][0] for result in run_in_segments(model, cases))
        return float(np.abs(alone - together).max())

    assert spread() > 1e-2
    exact_activations(model)
    assert not quantises_activations(model.graph)
    assert spread() < 1e-5


def test_exact_activations_leave_the_weights_as_they_are(quantised) -> None:
    """The edited graph computes what the float graph with the dequantised weights computes."""
    model, floats = load_graph(quantised()), load_graph(fixture_of(TORCH).path)
    integers = {name: value.const_value for name, value in model.graph.initializers.items()}
    for name, value in floats.graph.initializers.items():
        if f"{name}_quantized" in integers:
            numbers, scale, zero = (
                integers[f"{name}_{part}"].numpy().astype(np.float32)
                for part in ("quantized", "scale", "zero_point")
            )
            value.const_value = ir.tensor((numbers - zero) * scale, name=name)
    exact_activations(model)
    case = feeds(model, [list(range(3, 15))])
    ours, theirs = (run_in_segments(graph, [case])[0]["logits"] for graph in (model, floats))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_quantised_head_is_computed_for_the_chosen_tokens_only(quantised, tmp_path) -> None:
    bundle = rewrite(quantised(), clusters_of(TORCH), tmp_path / "bundle")
    graph = onnx.load(bundle.model_path).graph
    gather = next(node for node in graph.node if node.op_type == "GatherND" and "selected" in node.output[0])
    readers = [node.op_type for node in graph.node if gather.output[0] in node.input]
    assert readers == ["DynamicQuantizeLinear"]


def test_a_wrong_rewrite_of_a_quantised_file_does_not_pass(quantised, tmp_path, monkeypatch) -> None:
    from chai_export.graph import pipeline

    transform = pipeline.transform

    def scaled(model, *rest):
        transform(model, *rest)
        node = next(node for node in model.graph if node.domain == "chai")
        node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.01)

    monkeypatch.setattr(pipeline, "transform", scaled)
    with pytest.raises(ChaiError, match="differs from the source"):
        rewrite(quantised(), clusters_of(TORCH), tmp_path / "bundle")
