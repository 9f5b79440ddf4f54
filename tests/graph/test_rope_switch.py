"""Files of other exporters that choose rotary factors for a whole call: chosen by row instead, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph import pipeline
from chai_export.graph.stage import explain, rewrite
from chai_export.models.loading import load_model
from chai_export.models.oracle import model_logits
from chai_export.runtime.runner import load
from tests.helpers.onnx_fixtures import ROOT, Fixture

ORIGINAL = 24
IF, OFFSET = Fixture("G-genai-0.18.0-cpu-fp32-gqa-longrope"), Fixture("H-genai-0.18.0-dml-fp16-gqa-longrope")
GATHERED = Fixture("I-genai-0.18.0-cpu-fp16-gqa-longrope")
CONSTANT = Fixture("A-torch-2.13.0-opset18-sdpa-gqa")
Edit = Callable[[onnx.GraphProto], None]


def changed(fixture: Fixture, directory: Path, edit: Edit) -> Path:
    """A copy of a fixture whose graph was edited."""
    target = directory / "source"
    shutil.copytree(fixture.path, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    edit(model.graph)
    onnx.save(model, target / "model.onnx")
    return target


def bundle_of(source: Path, directory: Path, fixture: Fixture) -> Bundle:
    return rewrite(source, Clusters([fixture.kv_heads] * fixture.layers), directory / "bundle")


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(each for each in graph.node if each.name.endswith(name))


@pytest.mark.parametrize("fixture", [IF, OFFSET, GATHERED], ids=["if", "offset", "if-fp16"])
def test_rows_of_one_batch_choose_for_themselves(fixture: Fixture, tmp_path: Path) -> None:
    bundle = bundle_of(fixture.path, tmp_path, fixture)
    assert bundle.manifest.switch_lengths == [ORIGINAL]
    runner = load(bundle.path, heads="all")
    ids = [*fixture.reference["input_ids"].tolist(), *fixture.reference["greedy"].tolist()]
    prompts = [ids[:12], ids[:22], ids[:30]]  # below, crossing and above
    made = runner.generate(prompts, max_new_tokens=10, ignore_eos=True)
    for prompt, generation in zip(prompts, made, strict=True):
        assert generation.token_ids == ids[len(prompt) : len(prompt) + 10]
    model = load_model(fixture.model)
    for length in (ORIGINAL, ORIGINAL + 1):
        expected = model_logits(model, ids[:length])
        allowed = 1e-4 if fixture is IF else 1e-2 * np.abs(expected).max()
        for chunks in ([length], [12, length - 12], [12] + [1] * (length - 12)):
            assert np.abs(runner.logits(ids[:length], chunks=chunks) - expected).max() <= allowed


def test_tensorrt_says_that_it_does_not_take_them(tmp_path: Path) -> None:
    bundle = bundle_of(IF.path, tmp_path, IF)
    with pytest.raises(ChaiError, match="rotary factors that follow the length"):
        ce.build(bundle.path, "tensorrt")


def _threshold_from_positions(graph: onnx.GraphProto) -> None:
    """The tables of form G, chosen the other way round by ``24 >= number of positions``."""
    greater = node(graph, "rope_caches_subgraph/Greater")
    greater.op_type = "GreaterOrEqual"
    greater.input[:] = [greater.input[1], greater.input[0]]
    branches = node(graph, "rope_caches_subgraph/If")
    for attribute in branches.attribute:
        attribute.name = "else_branch" if attribute.name == "then_branch" else "then_branch"


def test_a_choice_is_recognised_by_what_it_does(tmp_path: Path) -> None:
    bundle = bundle_of(changed(IF, tmp_path, _threshold_from_positions), tmp_path, IF)
    assert bundle.manifest.switch_lengths == [ORIGINAL]
    ids = IF.reference["input_ids"].tolist()
    (made,) = load(bundle.path, heads="all").generate([ids], max_new_tokens=32, ignore_eos=True)
    assert made.token_ids == IF.reference["greedy"].tolist()


def _growing(graph: onnx.GraphProto) -> None:
    """Positions that are stretched by the largest one of the call, as in dynamic NTK."""
    compare, cast = node(graph, "pos_ids_reformat/GreaterOrEqual"), node(graph, "pos_ids_reformat/Cast")
    compare.op_type = "Div"
    cast.attribute[0].i = onnx.TensorProto.INT64
    del graph.value_info[:]


def _short_table(graph: onnx.GraphProto) -> None:
    for attribute in node(graph, "rope_caches_subgraph/If").attribute:
        if attribute.name == "else_branch":
            for constant in attribute.g.node:
                array = numpy_helper.to_array(constant.attribute[0].t)
                constant.attribute[0].t.CopyFrom(numpy_helper.from_array(array[: ORIGINAL - 1]))
            for output in attribute.g.output:
                output.type.tensor_type.shape.dim[0].dim_value = ORIGINAL - 1


def _other_reader(graph: onnx.GraphProto) -> None:
    """The chosen table is multiplied with hidden states too."""
    mean = helper.make_node("ReduceMean", ["cos_cache"], ["mean_of_table"], keepdims=0)
    first = next(each for each in graph.node if each.op_type == "MatMul")
    scaled = helper.make_node("Mul", [first.input[0], "mean_of_table"], ["scaled"])
    place = list(graph.node).index(first)
    first.input[0] = "scaled"
    graph.node.insert(place, scaled)
    graph.node.insert(place, mean)


REFUSED = {
    "factors that grow with the largest position": (OFFSET, _growing, "wrong in batches and chunks"),
    "a table that ends before the switch": (IF, _short_table, "tables of [23] positions in rows of up to 24"),
    "a chosen constant read by something else": (IF, _other_reader, "is no RotaryEmbedding"),
}


@pytest.mark.parametrize(("fixture", "edit", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_chosen_by_row_is_refused(
    fixture: Fixture, edit: Edit, words: str, tmp_path: Path
) -> None:
    source = changed(fixture, tmp_path, edit)
    with pytest.raises(ChaiError) as caught:
        bundle_of(source, tmp_path, fixture)
    assert words in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_the_proof_of_rows_sees_a_choice_that_nobody_recognised(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "find_switches", lambda *_: [])
    with pytest.raises(ChaiError, match="other rows of a call"):
        bundle_of(OFFSET.path, tmp_path, OFFSET)


def test_explain_names_what_stands_in_the_way_of_rows(tmp_path: Path) -> None:
    assert explain(IF.path).rewritable
    report = explain(changed(IF, tmp_path, _other_reader))
    assert "is no RotaryEmbedding" in report.verdict


@pytest.mark.parametrize(
    ("rope", "last"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 40}, 40),
        ({"type": "dynamic", "factor": 2.0}, 128),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 40}, None),
    ],
    ids=["longrope", "dynamic", "yarn"],
)
def test_positions_end_where_a_graph_lacks_the_factors_that_its_configuration_has(
    rope: dict[str, object], last: int | None, tmp_path: Path
) -> None:
    """Tracing exporters keep the branch that they traced, so the file has one set of factors."""
    source = changed(CONSTANT, tmp_path, lambda graph: None)
    config = {"model_type": "llama", "max_position_embeddings": 128, "rope_scaling": rope}
    (source / "config.json").write_text(json.dumps(config))
    manifest = bundle_of(source, tmp_path, CONSTANT).manifest
    assert manifest.rope is not None
    assert (manifest.rope.last_length, manifest.max_positions) == (last, last)
    assert manifest.rope.types == [rope.get("rope_type", rope.get("type"))]


def test_the_fixture_crosses_its_original_context() -> None:
    config = json.loads((ROOT / "models" / "phi3-longrope" / "config.json").read_text())
    assert config["original_max_position_embeddings"] == ORIGINAL
    assert 12 < ORIGINAL < 12 + 32
