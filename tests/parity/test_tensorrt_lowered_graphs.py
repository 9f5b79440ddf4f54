"""Graphs of onnxruntime-genai in the operators of ONNX, for TensorRT, compute what they did before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.engines.tensorrt import save
from chai_export.engines.tensorrt_lowering import lower_operators
from chai_export.graph.stage import rewrite
from tests.helpers.graph_runner import GraphRunner
from tests.helpers.onnx_fixtures import REWRITTEN

TOLERANCES = {
    "G-genai-0.18.0-cpu-fp32-gqa": 1e-5,
    "G-genai-0.18.0-cpu-int4-gqa-bias": 1e-5,
    "H-genai-0.18.0-dml-fp16-gqa": 2e-2,
    "I-genai-0.18.0-cpu-fp16-mha": 2e-2,
}
EXACT = 1
"""accuracy_level of MatMulNBits: activations are not rounded to 8 bits, as they never are in TensorRT."""


def lowered(bundle: Bundle) -> Path:
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    lower_operators(model, bundle.path, bundle.path / "integers.data", "integers.data")
    path = bundle.path / "lowered.onnx"
    save(model, path)
    return path


def compute_exactly(bundle: Bundle) -> None:
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = EXACT
    save(model, bundle.model_path)


@pytest.mark.parametrize("name", TOLERANCES)
def test_prefill_and_decode_give_the_same_maps_and_logits(name: str, tmp_path: Path) -> None:
    fixture = next(fixture for fixture in REWRITTEN if fixture.name == name)
    clusters = Clusters([max(1, fixture.kv_heads // 2)] * fixture.layers)
    bundle = rewrite(fixture.path, clusters, tmp_path / "bundle")
    compute_exactly(bundle)
    one, other = (GraphRunner(bundle, batch=2, capacity=16, heads="chai") for _ in range(2))
    other.session = onnxruntime.InferenceSession(str(lowered(bundle)), providers=["CPUExecutionProvider"])
    steps = ([[5, 11, 7, 40, 3, 3, 64, 21], [17, 2, 40, 33, 9]], [[10], [20]], [[11], []])
    for rows in steps:
        logits = [runner.step(rows) for runner in (one, other)]
        for row, new in enumerate(rows):
            got, wanted = (array[row, : len(new)].astype(np.float32) for array in reversed(logits))
            np.testing.assert_allclose(got, wanted, atol=TOLERANCES[name])
        np.testing.assert_array_equal(one.head_map, other.head_map)
