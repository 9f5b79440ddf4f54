"""The forms in which torch writes attention: each is recognised, and what is left of each graph is clean."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.graph.explain.count_ops import count_ops
from chai_export.graph.prove import segments
from chai_export.graph.stage import explain, rewrite
from chai_export.op.schema import signature
from tests.helpers.exported import bundle_of, exported, kept_of, model_of
from tests.helpers.graph_runner import GraphRunner

FORMS = {"A": (18, "sdpa"), "B": (18, "eager"), "C": (23, "sdpa"), "D": (24, "sdpa")}
CASES = [(form, name) for form in FORMS for name in ("llama-mha", "llama-gqa")]


@pytest.mark.parametrize(("form", "name"), CASES)
def test_form_is_recognised(form: str, name: str) -> None:
    explanation = explain(exported(name, *FORMS[form]))
    assert explanation.rewritable
    assert [row[1] for row in explanation.rows()] == [form] * len(kept_of(name))


@pytest.mark.parametrize(("form", "name"), CASES)
def test_forms_give_equal_logits(form: str, name: str) -> None:
    prompt = [4, 8, 15, 16, 23, 42, 7]
    got = GraphRunner(bundle_of(name, *FORMS[form]), 1, 8).step([prompt])
    expected = GraphRunner(bundle_of(name), 1, 8).step([prompt])
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("form", "name"), CASES)
def test_nothing_of_the_old_attention_is_left(form: str, name: str) -> None:
    bundle = bundle_of(name, *FORMS[form])
    graph = ir.load(bundle.model_path).graph
    ops = count_ops(bundle.model_path)
    assert ops["chai::ClusteredHeadAttention"] == len(kept_of(name))
    # No mask, no softmax, no repeated KV heads; RoPE and shapes may concatenate, caches may not.
    gone = {"Softmax", "Attention", "Where", "Expand", "LessOrEqual", "GatherND", "And", "IsNaN", "Trilu"}
    assert gone & set(ops) <= {"GatherND"}
    assert ops["GatherND"] == 1, "one gather of hidden states at output_positions"
    caches = {value.name for value in graph.inputs if value.name.startswith(("past_key", "past_value"))}
    for node in graph:
        if node.domain != "chai":
            assert not caches & {value.name for value in node.inputs if value is not None}, node
    assert Counter(node.op_type for node in graph)["RotaryEmbedding"] in (0, 2 * len(kept_of(name)))


def names_and_dims(values: object) -> dict[str, list[object]]:
    return {value.name: [str(dim) for dim in value.shape] for value in values}  # type: ignore[attr-defined]


def test_inputs_and_outputs_are_those_of_the_design() -> None:
    graph = ir.load(bundle_of("llama-gqa").model_path).graph
    caches_in = {}
    for layer in range(2):
        caches_in[f"past_key.{layer}"] = ["pages", f"kept_heads_{layer}", "page_length", "8"]
        caches_in[f"past_value.{layer}"] = ["pages", "2", "page_length", "8"]
    assert names_and_dims(graph.inputs) == {
        "input_ids": ["batch", "tokens"],
        "lengths": ["batch"],
        "past_lengths": ["batch"],
        "output_positions": ["batch", "outputs"],
        "page_table": ["batch", "row_pages"],
        "head_map": ["2", "batch", "8"],
        **caches_in,
    }
    presents = {name.replace("past", "present"): dims for name, dims in caches_in.items()}
    assert names_and_dims(graph.outputs) == {
        "logits": ["batch", "outputs", "96"],
        "present_head_map": ["2", "batch", "8"],
        **presents,
    }
    types = {value.name: value.dtype for value in graph.inputs}
    assert types["input_ids"] == types["output_positions"] == ir.DataType.INT64
    whole = {types[name] for name in ("lengths", "past_lengths", "head_map", "page_table")}
    assert whole == {ir.DataType.INT32}


@pytest.mark.parametrize("form", FORMS)
def test_the_op_is_written_in_full_with_its_function(form: str) -> None:
    opset, attention = FORMS[form]
    path = bundle_of("llama-gqa", opset, attention).model_path
    onnx.checker.check_model(path)
    model = onnx.load(path)
    (function,) = model.functions
    imported = {entry.domain: entry.version for entry in function.opset_import}
    assert imported[""] == opset
    nodes = [node for node in model.graph.node if node.domain == "chai"]
    for node in nodes:
        assert {attribute.name for attribute in node.attribute} == set(signature().attribute_names)
        # Terms of the scores that a model has not are left off the end.
        assert len(node.input) == signature().input_names.index("sinks")
        assert node.attribute[0].f == pytest.approx(8**-0.5)


def test_weights_are_taken_over_as_they_are() -> None:
    source, bundle = exported("llama-gqa"), bundle_of("llama-gqa")
    data, copy = Path(f"{source}.data"), bundle.path / "model.onnx.data"
    assert copy.read_bytes() == data.read_bytes()
    # onnx refuses a data file with two names, in the bundle and at the user's own place.
    assert copy.stat().st_nlink == data.stat().st_nlink == 1
    for path in (source, bundle.model_path):
        onnx.load(path)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_model_is_proven_in_small_pieces(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model that does not fit into memory is: each piece holds the weights of about one projection."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 5000)
    pieces = []
    split = segments._split
    monkeypatch.setattr(segments, "_split", lambda *args: pieces.append(0) or list(split(*args)))
    bundle = rewrite(exported("llama-gqa", *FORMS[form]), Clusters(kept_of("llama-gqa")), tmp_path / "bundle")
    assert len(pieces) == 2
    assert bundle.manifest.proof == bundle_of("llama-gqa", *FORMS[form]).manifest.proof


def test_the_proof_is_in_the_manifest() -> None:
    bundle: Bundle = bundle_of("llama-gqa", *FORMS["A"])
    proof = bundle.manifest.proof
    assert proof is not None
    assert "2 attentions" in proof.compared
    assert "whole model" in proof.compared
    assert 0 <= proof.max_abs_diff <= proof.tolerance
    assert model_of("llama-gqa").config.vocab_size == bundle.manifest.vocab_size
