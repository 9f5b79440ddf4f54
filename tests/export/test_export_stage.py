"""The whole export stage: a model in, a bundle out, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.exporter import stage
from chai_export.exporter.stage import export
from tests.helpers.exported import model_of
from tests.helpers.graph_runner import GraphRunner

NAME = "qwen2-gqa"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_bundle_of_each_dtype(dtype: str, tmp_path: Path) -> None:
    bundle = export(model_of(NAME), Clusters((1,)), tmp_path / "bundle", dtype=dtype, probe_tokens=4)
    assert bundle.manifest.dtype == dtype
    assert bundle.manifest.probe_tokens == 4
    assert bundle.manifest.source.kind == "hf"
    assert bundle.manifest.source.model_type == "qwen2"
    assert bundle.manifest.context_length == 128
    assert bundle.manifest.generation.eos_token_ids == [2]
    names = {path.name for path in bundle.path.iterdir()}
    assert {"model.onnx", "model.onnx.data", "clusters.json", "manifest.json"} <= names
    assert not any(name.startswith(".") for name in names)
    graph = ir.load(bundle.model_path).graph
    stored = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype]
    assert {value.dtype.name for value in graph.inputs if value.name.startswith("past_key.")} == {stored}
    if dtype == "float32":
        logits = GraphRunner(bundle, 1, 8).step([[3, 1, 4, 1, 5]])
        assert np.isfinite(logits).all()


def test_clusters_are_checked_before_anything_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chai_export.exporter.torch_export.export_onnx", None)
    with pytest.raises(ChaiError, match="layer 0 keeps 5"):
        export(model_of(NAME), Clusters((5,)), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_interrupted_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chai_export.graph.pipeline.rewrite_model", interrupted)
    monkeypatch.setattr(
        "chai_export.exporter.torch_export.export_onnx", lambda model, where: where / "x.onnx"
    )
    with pytest.raises(KeyboardInterrupt):
        export(model_of(NAME), Clusters((1,)), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    assert stage._WORK.startswith(".")


def test_a_tied_embedding_is_stored_once_and_multiplied_as_it_is_stored(tmp_path: Path) -> None:
    model = model_of("gpt2")
    assert model.config.tie_word_embeddings
    bundle = export(model, None, tmp_path / "bundle")
    graph = ir.load(bundle.model_path).graph
    (head,) = [node for node in graph if node.op_type == "Gemm" and node.outputs[0].shape is not None
               and node.inputs[1].name.endswith("lm_head.weight")]  # fmt: skip
    assert head.attributes["transB"].as_int() == 1
    assert any(node.op_type == "Gather" and node.inputs[0] is head.inputs[1] for node in graph)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    floats = [value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert sum(value.const_value.size for value in floats) < 1.05 * numbers
