"""Every family in 16 bits: a graph that ONNX's checker and ONNX Runtime take, near the float32 model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from chai_export.exporter.norm_types import align_norm_types
from chai_export.runtime.runner import load
from tests.helpers.exported import bundle_in, model_of
from tests.helpers.families import FAMILIES

TOKENS = [5, 11, 7, 90, 3, 3, 64, 21, 8]
IN_CI = {("gemma-gqa", "float16"), ("gemma-gqa", "bfloat16"), ("gptj", "float16")}
EACH = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in IN_CI else [pytest.mark.slow])
    for name in FAMILIES
    for dtype in ("float16", "bfloat16")
]


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_a_family_in_16_bits(name: str, dtype: str, tmp_path: Path) -> None:
    bundle = bundle_in(name, dtype, tmp_path)
    onnx.checker.check_model(str(bundle.model_path), full_check=True)
    if dtype == "bfloat16":  # ONNX Runtime computes none on CPUs; the proof ran the graph in float32
        assert bundle.manifest.proof is not None
        return
    logits = load(bundle.path, heads="all").logits(TOKENS)
    with torch.no_grad():
        expected = model_of(name)(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()
    assert np.abs(logits - expected).max() <= 0.05 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("narrow", ["input", "scale"])
def test_a_norm_reads_one_dtype_and_its_result_keeps_its_own(narrow: str) -> None:
    types = {"input": ir.DataType.FLOAT, "scale": ir.DataType.FLOAT} | {narrow: ir.DataType.FLOAT16}
    values = [ir.Value(name=n, type=ir.TensorType(t), shape=ir.Shape([2, 4])) for n, t in types.items()]
    values[1].shape = ir.Shape([4])
    norm = ir.node("RMSNormalization", values, {"axis": -1, "stash_type": 1, "epsilon": 0.5}, name="norm")
    norm.outputs[0].name, norm.outputs[0].dtype = "normed", types["scale"]
    double = ir.node("Add", [norm.outputs[0], norm.outputs[0]])
    result = double.outputs[0]
    result.name, result.dtype, result.shape = "result", types["scale"], ir.Shape([2, 4])
    graph = ir.Graph(values, [result], nodes=[norm, double], opset_imports={"": 23}, name="norms")
    model = ir.Model(graph, ir_version=10)
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    align_norm_types(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    inputs = {
        "input": np.arange(8).reshape(2, 4).astype(types["input"].numpy()),
        "scale": np.array([1, 2, 3, 4], types["scale"].numpy()),
    }
    found = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, inputs)[0]
    rows = inputs["input"].astype(np.float32)
    expected = 2 * rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 0.5) * [1, 2, 3, 4]
    assert found.dtype == types["scale"].numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-3)
