"""Matrices in blocks: what ONNX Runtime's MatMulNBits multiplies by is what `dequantised` says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from chai_export.graph.weights.block_weight import BlockWeight, block_product, named_block_weight
from chai_export.graph.weights.quantise import Method, WeightFormat

RNG = np.random.default_rng(20240312)
TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def model_of(weights: list[BlockWeight], dtype: str) -> ir.Model:
    """x [tokens, in] times each of the weights, all stored under one name."""
    width = weights[0].width
    given = ir.Value(name="x", shape=ir.Shape(["tokens", width]), type=ir.TensorType(TYPES[dtype]))
    graph = ir.Graph([given], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1}, name="product")
    for weight in weights:
        node = block_product(graph, given, weight, "layer.weight", accuracy_level=1)
        node.outputs[0].name = f"y{len(graph.outputs)}"
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10)


def product(weight: BlockWeight, x: np.ndarray) -> np.ndarray:
    content = ir.to_proto(model_of([weight], str(x.dtype))).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, 32), (8, 128)])
def test_onnxruntime_multiplies_by_what_the_blocks_stand_for(bits, block, method, dtype):
    weight = RNG.standard_normal((24, 160)).astype(dtype)  # 160 is no multiple of 128
    weight[3] = 0
    quantised = WeightFormat(bits, block, method).quantise(weight)
    numbers = quantised.dequantised()
    x = RNG.standard_normal((3, 160)).astype(dtype)
    assert numbers.shape == weight.shape
    assert not numbers[3].any()
    expected = x.astype(np.float32) @ numbers.T
    allowed = 1e-4 if dtype == "float32" else 0.05
    np.testing.assert_allclose(product(quantised, x), expected, atol=allowed)
    # Half a step of the widest block, and what rounding zero points to a code adds.
    assert np.abs(numbers - weight).max() <= 8.0 / (2**bits - 1)


@pytest.mark.parametrize(
    ("zeros", "bits"), [("none", 4), ("none", 8), ("codes", 4), ("codes", 8), ("floats", 4)]
)
def test_given_codes_are_packed_as_the_operator_reads_them(bits, zeros):
    codes = RNG.integers(0, 2**bits, (5, 96)).astype(np.uint8)
    scales = RNG.random((5, 3), np.float32) + 0.1
    points = {
        "none": None,
        "codes": RNG.integers(0, 2**bits, (5, 3)).astype(np.uint8),
        "floats": RNG.random((5, 3), np.float32) * 2**bits,
    }[zeros]
    weight = BlockWeight.from_codes(codes, scales, points, bits=bits)
    middle = np.full((5, 3), 2 ** (bits - 1)) if points is None else points
    expected = (codes.astype(np.float32) - np.repeat(middle, 32, axis=1)) * np.repeat(scales, 32, axis=1)
    np.testing.assert_allclose(weight.dequantised(), expected, rtol=1e-6, atol=1e-6)
    x = np.eye(96, dtype=np.float32)
    np.testing.assert_allclose(product(weight, x).T, expected, rtol=1e-5, atol=1e-4)


def test_a_weight_of_two_products_is_stored_once_and_read_back():
    weight = WeightFormat(4, 32, Method.RTN).quantise(RNG.standard_normal((16, 64)).astype(np.float32))
    model = model_of([weight, weight], "float32")
    assert sorted(model.graph.initializers) == [
        "layer.weight.blocks",
        "layer.weight.scales",
        "layer.weight.zero_points",
    ]
    for node in model.graph:
        name, again = named_block_weight(node)
        assert name == "layer.weight"
        np.testing.assert_array_equal(again.dequantised(), weight.dequantised())


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="scales are"):
        BlockWeight(np.zeros((4, 2, 16), np.uint8), np.zeros((4, 3), np.float32), None, 4, 32, 64)
    with pytest.raises(ValueError, match="blocks of 24"):
        BlockWeight(np.zeros((4, 2, 12), np.uint8), np.zeros((4, 2), np.float32), None, 4, 24, 48)
    scales = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="zero points in 8 bits"):
        BlockWeight(np.zeros((4, 2, 32), np.uint8), scales, scales, 8, 32, 64)
