"""Constants near 0 and 1 survive the optimiser, and a norm with a small epsilon its rows of zeros."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript import optimizer

from chai_export.exporter.exact_scalars import exact_scalars
from chai_export.exporter.torch_export import export_onnx
from tests.helpers.families import family_model


def graph_with(op_type: str, number: float, dtype: ir.DataType, *, initializer: bool) -> ir.Model:
    """y = x op number, the number as an initializer or made by a node."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(dtype))
    tensor = ir.tensor(np.array(number, dtype.numpy()), name="c")
    if initializer:
        nodes, constant = (
            [],
            ir.Value(name="c", shape=ir.Shape(()), type=ir.TensorType(dtype), const_value=tensor),
        )
    else:
        nodes = [ir.node("Constant", [], {"value": tensor})]
        constant = nodes[0].outputs[0]
    nodes.append(ir.node(op_type, [x, constant]))
    nodes[-1].outputs[0].name = "y"
    graph = ir.Graph(
        [x],
        [nodes[-1].outputs[0]],
        nodes=nodes,
        initializers=[constant] if initializer else [],
        opset_imports={"": 23},
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("initializer", [True, False])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.DOUBLE])
@pytest.mark.parametrize(
    ("op_type", "number", "stays"),
    [
        ("Add", 1e-8, True), ("Add", -1e-9, True), ("Sub", 1e-8, True), ("Add", 0.0, False),
        ("Sub", 0.0, False), ("Mul", 1.000001, True), ("Mul", 0.999999, True), ("Div", 1.000005, True),
        ("Mul", 1.0, False), ("Div", 1.0, False), ("Add", 0.5, True),
    ],
)  # fmt: skip
def test_only_exact_zeros_and_ones_are_dropped(op_type, number, stays, dtype, initializer):
    model = graph_with(op_type, number, dtype, initializer=initializer)
    with exact_scalars(model):
        optimizer.optimize_ir(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert (op_type in [node.op_type for node in model.graph]) == stays
    if stays:
        constant = ir.convenience.get_const_tensor(model.graph[-1].inputs[1])
        assert constant.numpy() == np.array(number, dtype.numpy())
        assert constant.dtype == dtype


@pytest.mark.parametrize("opset", [18, 23])
def test_a_row_of_zeros_stays_finite_where_epsilon_is_small(opset, tmp_path):
    """Helium's epsilon is 1e-8, and the embedding of its padding token is zero."""
    model = family_model("helium-gqa", num_hidden_layers=1)
    assert model.config.rms_norm_eps == 1e-8
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = 0.0
        tokens = torch.tensor([[3, 5, 3, 8]])
        expected = model(tokens).logits.numpy()
    session = ort.InferenceSession(
        str(export_onnx(model, tmp_path, opset=opset)), providers=["CPUExecutionProvider"]
    )
    caches = {f"past_key_values.0.{part}": np.zeros((1, 4, 0, 8), np.float32) for part in ("key", "value")}
    feeds = {"input_ids": tokens.numpy(), "attention_mask": np.ones((1, 4), np.int64)}
    logits = session.run(["logits"], {**feeds, "position_ids": np.arange(4)[None], **caches})[0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
