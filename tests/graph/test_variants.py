"""What people do to a decoder before they come here: the right result, or the command that helps."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph import pipeline
from chai_export.graph.explain.estimate import Estimate
from chai_export.graph.stage import explain, rewrite
from chai_export.runtime.runner import load
from tests.helpers import onnx_variants as variants
from tests.helpers.exported import bundle_of, kept_of
from tests.helpers.graph_runner import GraphRunner
from tests.helpers.onnx_fixtures import ALL, Fixture
from tests.helpers.source_runner import SourceRunner
from tests.helpers.static_exports import NAME, exported_with

BY_NAME = {fixture.name: fixture for fixture in ALL}
FORMS = {
    "A": BY_NAME["A-torch-2.13.0-opset18-sdpa-gqa"],
    "B": BY_NAME["B-torch-2.13.0-opset18-eager-mha"],
    "C": BY_NAME["C-torch-2.13.0-opset23-sdpa-gqa"],
    "E": BY_NAME["E-torch-2.13.0-static-cache-gqa"],
    "F": BY_NAME["F-optimum-0.1.0-gqa"],
    "G": BY_NAME["G-genai-0.18.0-cpu-fp32-gqa"],
    "K": BY_NAME["K-handmade-onnx-1.23.2-opset23-past-gqa"],
}
Change = Callable[[Path, Path], Path]


def made(change: Change, form: str, tmp_path: Path) -> Path:
    """The fixture of a form, changed; with its weights beside it."""
    for file in FORMS[form].path.iterdir():
        shutil.copy(file, tmp_path)
    return change(tmp_path / "model.onnx", tmp_path / "changed.onnx")


def rewritten(path: Path, fixture: Fixture, tmp_path: Path) -> Bundle:
    return rewrite(path, Clusters([fixture.kv_heads] * fixture.layers), tmp_path / "bundle")


def check_reference(bundle: Bundle, fixture: Fixture, tolerance: float = 1e-4) -> None:
    """Logits and greedy tokens of the model that the fixture was exported from."""
    runner = load(bundle.path, heads="all")
    prompt, greedy = fixture.reference["input_ids"].tolist(), fixture.reference["greedy"].tolist()
    assert np.abs(runner.logits(prompt) - fixture.reference["logits"]).max() <= tolerance
    (generation,) = runner.generate([prompt], max_new_tokens=len(greedy), ignore_eos=True)
    assert generation.token_ids == greedy


# --- inputs, outputs ---


@pytest.mark.parametrize("form", ["A", "E", "F", "G"])
def test_int32_inputs(form: str, tmp_path: Path) -> None:
    path = made(variants.int32_inputs, form, tmp_path)
    types = {value.name: value.type.tensor_type.elem_type for value in onnx.load(path).graph.input}
    assert types["input_ids"] == onnx.TensorProto.INT32
    check_reference(rewritten(path, FORMS[form], tmp_path), FORMS[form])


@pytest.mark.parametrize(
    ("form", "how"), [("A", "slice"), ("A", "gather"), ("B", "after"), ("F", "counted"), ("G", "slice")]
)
def test_logits_of_the_last_token_become_those_of_all(form: str, how: str, tmp_path: Path) -> None:
    path = made(lambda source, target: variants.last_token(source, target, how), form, tmp_path)
    check_reference(rewritten(path, FORMS[form], tmp_path), FORMS[form])


def test_logits_of_another_token_are_refused(tmp_path: Path) -> None:
    path = made(lambda source, target: variants.last_token(source, target, "first"), "A", tmp_path)
    with pytest.raises(ChaiError, match="export the logits of all tokens"):
        rewritten(path, FORMS["A"], tmp_path)
    assert not (tmp_path / "bundle").exists()


# --- converters and optimisers ---


@pytest.mark.parametrize("form", ["A", "F"])
def test_float16_with_float32_outside(form: str, tmp_path: Path) -> None:
    path = made(variants.half_inside, form, tmp_path)
    types = {value.name: value.type.tensor_type.elem_type for value in onnx.load(path).graph.input}
    assert types["past_key_values.0.key"] == onnx.TensorProto.FLOAT
    bundle = rewritten(path, FORMS[form], tmp_path)
    assert bundle.manifest.dtype == "float16"
    runner = load(bundle.path, heads="all")
    reference = FORMS[form].reference
    assert np.abs(runner.logits(reference["input_ids"].tolist()) - reference["logits"]).max() <= 2e-2


@pytest.mark.parametrize("form", ["A", "B", "F"])
def test_what_onnxruntime_fused(form: str, tmp_path: Path) -> None:
    path = made(variants.fused, form, tmp_path)
    assert any(node.op_type == "FusedMatMul" for node in onnx.load(path).graph.node)
    check_reference(rewritten(path, FORMS[form], tmp_path), FORMS[form])


@pytest.mark.parametrize("form", ["C", "E", "G", "K"])
def test_what_onnxruntime_fused_around_attention_operators(form: str, tmp_path: Path) -> None:
    assert explain(made(variants.fused, form, tmp_path)).rewritable


@pytest.mark.parametrize("form", ["A", "F"])
def test_a_merged_decoder(form: str, tmp_path: Path) -> None:
    path = made(variants.merged, form, tmp_path)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["If"]
    check_reference(rewritten(path, FORMS[form], tmp_path), FORMS[form])


def test_attention_in_another_branch(tmp_path: Path) -> None:
    path = made(variants.merged, "A", tmp_path)
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[0] = "input_ids"
    onnx.save(model, path)
    with pytest.raises(ChaiError, match=r"inside node 'optimum::if' \(If\).*optimum-cli export onnx"):
        explain(path)


# --- quantisers ---


def check_source(path: Path, bundle: Bundle, fixture: Fixture) -> None:
    """A prompt in one piece, so that both quantise the same tensors: what is left is a step of the grid."""
    prompt = fixture.reference["input_ids"].tolist()
    expected = SourceRunner(path, optimised=True).logits(prompt, [], fixture.kv_heads)
    assert np.abs(load(bundle.path, heads="all").logits(prompt) - expected).max() <= 0.1


@pytest.mark.parametrize("form", ["A", "B", "F", "G"])
def test_dynamic_int8(form: str, tmp_path: Path) -> None:
    path = made(variants.dynamic_int8, form, tmp_path)
    assert "DynamicQuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    bundle = rewritten(path, FORMS[form], tmp_path)
    check_source(path, bundle, FORMS[form])


@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
@pytest.mark.parametrize("form", ["A", "B"])
def test_static_int8_of_weights(form: str, kind: str, tmp_path: Path) -> None:
    path = made(lambda s, t: variants.static_int8(s, t, kind, attention=False), form, tmp_path)
    bundle = rewritten(path, FORMS[form], tmp_path)
    check_source(path, bundle, FORMS[form])


@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
@pytest.mark.parametrize("form", ["A", "B", "F"])
def test_quantised_attention_is_refused_with_what_leaves_it_out(form: str, kind: str, tmp_path: Path) -> None:
    path = made(lambda s, t: variants.static_int8(s, t, kind, attention=True), form, tmp_path)
    with pytest.raises(ChaiError, match=r"layer 0.*attention itself is quantised.*nodes_to_exclude"):
        rewritten(path, FORMS[form], tmp_path)
    assert "quantize_dynamic" in explain(path).verdict


@pytest.mark.parametrize(("slot", "what"), [(0, "the probabilities"), (1, "the value")])
def test_one_quantised_operand_is_enough(slot: int, what: str, tmp_path: Path) -> None:
    def quantise(source: Path, target: Path) -> Path:
        model = onnx.load(source)
        softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
        product = next(node for node in model.graph.node if softmax.output[0] in node.input)
        variants.quantise_operand(model.graph, product, slot)
        onnx.save(model, target)
        return target

    report = explain(made(quantise, "B", tmp_path))
    assert f"attention itself is quantised ({what})" in report.verdict


def test_what_the_quantiser_takes_for_its_own_attention(tmp_path: Path) -> None:
    """quantize_dynamic knows one Attention, com.microsoft's, and writes QAttention for ONNX's as well."""
    path = made(variants.dynamic_int8, "C", tmp_path)
    assert "op_types_to_quantize=['MatMul']" in explain(path).verdict
    again = tmp_path / "again.onnx"
    variants.dynamic_int8(tmp_path / "model.onnx", again, op_types_to_quantize=["MatMul"])
    assert explain(again).rewritable


# --- sizes ---

PROMPTS = [[4, 8, 15, 16, 23, 42, 7], [3, 1, 4, 1, 5, 9, 2]]


@pytest.mark.parametrize("opset", [pytest.param(18, marks=pytest.mark.slow), 23])
def test_a_batch_fixed_at_one_becomes_free(opset: int, tmp_path: Path) -> None:
    path = exported_with(("tokens", "past"), 3, 5, opset)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    bundle = rewrite(path, Clusters(kept_of(NAME)), tmp_path / "bundle")
    mine, free = (GraphRunner(each, 2, 12) for each in (bundle, bundle_of(NAME)))
    np.testing.assert_allclose(mine.step(PROMPTS), free.step(PROMPTS), atol=1e-5)
    np.testing.assert_allclose(mine.step([[1], [2]]), free.step([[1], [2]]), atol=1e-5)


def test_a_batch_of_one_is_freed_only_where_the_whole_model_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "estimate", lambda *_: Estimate(1, 1, 1, 1, whole_model=False))
    with pytest.raises(ChaiError, match=r"takes 1 row in each call.*dynamic_shapes"):
        rewrite(exported_with(("tokens", "past"), 3, 5, 23), Clusters(kept_of(NAME)), tmp_path / "bundle")


def test_a_batch_of_one_that_cannot_be_freed(tmp_path: Path) -> None:
    """The first row taken out and put back: right for one row, silently another model for two."""
    model = onnx.load(exported_with(("tokens", "past"), 3, 5, 23))
    path = tmp_path / "model.onnx"
    variants.take_first_row(model.graph)
    onnx.save(model, path)
    with pytest.raises(ChaiError, match="takes 1 row in each call, and cannot be made to take more"):
        rewrite(path, Clusters(kept_of(NAME)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("sizes", [(1, 4), (1, 1), (3, None), (None, 1)])
def test_fixed_sizes_are_refused_with_what_frees_them(
    sizes: tuple[int | None, int | None], tmp_path: Path
) -> None:
    path = made(lambda source, target: variants.fix_token_ids(source, target, sizes), "A", tmp_path)
    shape = f"[{sizes[0] or 'batch'}, {sizes[1] or 'tokens'}]"
    with pytest.raises(ChaiError, match=rf"input_ids of shape {re.escape(shape)} only.*--no-dynamic-axes"):
        rewritten(path, FORMS["A"], tmp_path)


def test_an_export_without_dynamic_shapes(tmp_path: Path) -> None:
    """torch has folded the empty past away, so that the caches alone would give another reason."""
    with pytest.raises(ChaiError, match=r"input_ids of shape \[1, 4\] only.*dynamic_shapes"):
        rewrite(exported_with((), 4, 0), Clusters(kept_of(NAME)), tmp_path / "bundle")
