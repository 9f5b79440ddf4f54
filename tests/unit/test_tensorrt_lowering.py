"""Operators of ONNX Runtime's own in ONNX's terms: ONNX Runtime computes the same from both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic

from chai_export.engines.tensorrt_lowering import lower_operators
from chai_export.engines.tensorrt_parser import require_known_domains
from chai_export.errors import ChaiError

MICROSOFT = "com.microsoft"
ELEMENTS = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
TOLERANCES = {"float32": 1e-5, "float16": 5e-3}
GENERATOR = np.random.default_rng(0)


def normal(*shape: int) -> NDArray[np.float32]:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def model_of(
    op_type: str,
    inputs: Mapping[str, NDArray[Any]],
    constants: Mapping[str, NDArray[Any]],
    order: Sequence[str],
    outputs: Sequence[str] = ("y",),
    domain: str = MICROSOFT,
    **attributes: Any,
) -> onnx.ModelProto:
    """One node. Sizes of inputs but for the last are free, as they are in bundles."""
    element = next(v.dtype for v in (*inputs.values(), *constants.values()) if v.dtype.kind == "f")
    infos = [
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            [f"{name}_{axis}" for axis in range(array.ndim - 1)] + [array.shape[-1]],
        )
        for name, array in inputs.items()
    ]
    made = [onnx.helper.make_tensor_value_info(n, ELEMENTS[element.name], None) for n in outputs if n]
    node = onnx.helper.make_node(op_type, order, outputs, name="a node", domain=domain, **attributes)
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph([node], "one", infos, made, tensors)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(MICROSOFT, 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def check(model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], place: Path) -> onnx.ModelProto:
    """Lower the model, and compare all outputs before and after."""
    expected = run(model, feeds, place)
    lower_operators(model, place, place / "integers.data", "integers.data")
    require_known_domains(model)
    for one, other in zip(run(model, feeds, place), expected, strict=True):
        assert one.dtype == other.dtype
        tolerance = TOLERANCES[other.dtype.name] * max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=tolerance)
    return model


def run(model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], place: Path) -> list[NDArray[Any]]:
    """As the graph is written: ONNX Runtime's optimiser makes products of integers of float ones."""
    path = place / "model.onnx"
    path.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options).run(None, dict(feeds))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_after_a_sum_keeps_the_sum(dtype: str, bias: bool, tmp_path: Path) -> None:
    feeds = {name: normal(2, 3, 16).astype(dtype) for name in ("a", "b")}
    constants = {"scale": normal(16).astype(dtype)}
    if bias:
        constants["bias"] = normal(16).astype(dtype)
    order = ["a", "b", *constants]
    outputs = ("y", "", "", "sum")
    model = model_of(
        "SkipSimplifiedLayerNormalization", feeds, constants, order, outputs, MICROSOFT, epsilon=1e-6
    )
    check(model, feeds, tmp_path)


def test_a_norm_without_a_mean(tmp_path: Path) -> None:
    feeds = {"x": normal(2, 3, 16)}
    model = model_of(
        "SimplifiedLayerNormalization",
        feeds,
        {"scale": normal(16)},
        ["x", "scale"],
        domain="",
        axis=-1,
        epsilon=0.1,
        stash_type=1,
    )
    check(model, feeds, tmp_path)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((2, 4, 5, 16), {}),
        ((2, 5, 64), {}),
        ((2, 5, 64), {"num_heads": 4}),
        ((2, 5, 128), {"num_heads": 4, "rotary_embedding_dim": 16}),
        ((2, 4, 5, 32), {"num_heads": 4, "rotary_embedding_dim": 16}),
    ],
    ids=["by head", "heads from the table", "heads given", "partial", "partial by head"],
)
def test_rotary_embedding(
    interleaved: int, shape: tuple[int, ...], attributes: dict[str, int], tmp_path: Path
) -> None:
    angles = GENERATOR.uniform(0, 6, (20, 8)).astype(np.float32)
    constants = {"cos": np.cos(angles), "sin": np.sin(angles)}
    feeds = {"x": normal(*shape), "positions": GENERATOR.integers(0, 20, (2, 5))}
    order = ["x", "positions", "cos", "sin"]
    model = model_of("RotaryEmbedding", feeds, constants, order, interleaved=interleaved, **attributes)
    check(model, feeds, tmp_path)


ZERO_POINTS = ["none", "middle", "packed", "float"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("bits", "depth", "block"), [(4, 64, 32), (4, 36, 16), (4, 80, 32), (8, 64, 32)])
@pytest.mark.parametrize("zeros", ZERO_POINTS)
def test_integer_weights(dtype: str, bits: int, depth: int, block: int, zeros: str, tmp_path: Path) -> None:
    width, blocks = 24, -(-depth // block)
    feeds = {"x": normal(2, 3, depth).astype(dtype)}
    constants: dict[str, NDArray[Any]] = {
        "packed": GENERATOR.integers(0, 256, (width, blocks, block * bits // 8)).astype(np.uint8),
        "scales": (np.abs(normal(width, blocks)) / 8).astype(dtype),
    }
    points = -(-blocks * bits // 8)
    if zeros == "middle":
        constants["zeros"] = np.full((width, points), 0x88 if bits == 4 else 0x80, np.uint8)
    elif zeros == "packed":
        constants["zeros"] = GENERATOR.integers(0, 256, (width, points)).astype(np.uint8)
    elif zeros == "float":
        constants["zeros"] = GENERATOR.uniform(0, 1 << bits, (width, blocks)).astype(dtype)
    if bits == 8 and zeros == "float":
        pytest.skip("ONNX Runtime has no such kernel")
    order = [*constants]
    model = model_of(
        "MatMulNBits", feeds, constants, ["x", *order], K=depth, N=width, bits=bits, block_size=block
    )
    lowered = check(model, feeds, tmp_path)
    stored = next(t for t in lowered.graph.initializer if t.name == f"packed_int{bits}")
    assert stored.data_location == onnx.TensorProto.EXTERNAL
    assert (tmp_path / "integers.data").stat().st_size == width * blocks * block * bits // 8
    products = sum(node.op_type == "MatMul" for node in lowered.graph.node)
    assert products == (3 if zeros in ("packed", "float") else 1)


def test_one_weight_of_two_products_is_stored_once(tmp_path: Path) -> None:
    feeds = {"x": normal(2, 3, 32)}
    numbers = GENERATOR.integers(0, 256, (8, 1, 16)).astype(np.uint8)
    constants = {"packed": numbers, "scales": np.abs(normal(8, 1))}
    model = model_of("MatMulNBits", feeds, constants, ["x", *constants], K=32, N=8, bits=4, block_size=32)
    again = onnx.NodeProto()
    again.CopyFrom(model.graph.node[0])
    again.output[0], again.name = "z", "another"
    model.graph.node.append(again)
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    check(model, feeds, tmp_path)
    assert (tmp_path / "integers.data").read_bytes() == (numbers ^ 0x88).tobytes()


def test_a_graph_without_such_operators_stays_as_it_is(tmp_path: Path) -> None:
    model = model_of("Relu", {"x": normal(2, 3)}, {}, ["x"], domain="")
    before = model.SerializeToString()
    lower_operators(model, tmp_path, tmp_path / "integers.data", "integers.data")
    assert model.SerializeToString() == before
    assert not list(tmp_path.iterdir())


ROTARY: dict[str, Any] = {"cos": normal(20, 8), "sin": normal(20, 8)}
BITS: dict[str, Any] = {"packed": np.zeros((8, 1, 16), np.uint8), "scales": normal(8, 1)}
REFUSED = {
    "with 2 bits": ("MatMulNBits", {"x": normal(2, 32)}, BITS, {"K": 32, "N": 8, "bits": 2}),
    "weights in another order": (
        "MatMulNBits",
        {"x": normal(2, 32)},
        {**BITS, "zeros": np.zeros((8, 1), np.uint8), "order": np.zeros(32, np.int32)},
        {"K": 32, "N": 8, "bits": 4},
    ),
    "one offset in place of positions": (
        "RotaryEmbedding",
        {"x": normal(1, 5, 16), "positions": np.zeros(1, np.int64)},
        ROTARY,
        {},
    ),
    "packed batches": (
        "RotaryEmbedding",
        {"x": normal(1, 5, 16), "positions": np.zeros((1, 5), np.int64)},
        ROTARY,
        {"is_packed_batching": 1},
    ),
    "whose input packed is computed": (
        "MatMulNBits",
        {"x": normal(2, 32), "packed": np.zeros((8, 1, 16), np.uint8)},
        {"scales": normal(8, 1)},
        {"K": 32, "N": 8, "bits": 4},
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_has_no_equal_is_refused_by_name(how: str, tmp_path: Path) -> None:
    op_type, inputs, constants, attributes = REFUSED[how]
    model = model_of(op_type, inputs, constants, [*inputs, *constants], **attributes)
    with pytest.raises(ChaiError, match=rf"uses {op_type} .*{how}.* \(a node\), .* --backend onnxruntime"):
        lower_operators(model, tmp_path, tmp_path / "integers.data", "integers.data")


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_quantisation_keeps_its_weights_and_rounds_no_activations(
    kind: QuantType, per_channel: bool, tmp_path: Path
) -> None:
    table, weights = normal(20, 16) + 0.3, normal(16, 24) + 0.2
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["rows"]),
        onnx.helper.make_node("Tanh", ["rows"], ["x"]),
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    tensors = [onnx.numpy_helper.from_array(a, n) for a, n in ((table, "table"), (weights, "w"))]
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["B", "S"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["B", "S", 24])
    graph = onnx.helper.make_graph(nodes, "two", [ids], [y], tensors)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "float.onnx",
    )
    quantised = tmp_path / "quantised.onnx"
    quantize_dynamic(tmp_path / "float.onnx", quantised, weight_type=kind, per_channel=per_channel)
    model = onnx.load(str(quantised))
    arrays = {t.name: onnx.numpy_helper.to_array(t).astype(np.float32) for t in model.graph.initializer}
    rounded = [
        (arrays[f"{name}_quantized"] - arrays[f"{name}_zero_point"]) * arrays[f"{name}_scale"]
        for name in ("table", "w")
    ]
    feeds = {"ids": GENERATOR.integers(0, 20, (2, 5))}
    expected = np.tanh(rounded[0][feeds["ids"]]) @ rounded[1]
    assert np.abs(run(model, feeds, tmp_path)[0] - expected).max() > 1e-4  # rounded activations
    lower_operators(model, tmp_path, tmp_path / "integers.data", "integers.data")
    assert {node.op_type for node in model.graph.node} <= {
        "Cast", "DequantizeLinear", "Gather", "MatMul", "Mul", "ReduceSum", "Sub", "Tanh",
    }  # fmt: skip
    np.testing.assert_allclose(run(model, feeds, tmp_path)[0], expected, atol=1e-4)
    widths = {t.data_type for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] > 1}
    assert widths == {onnx.TensorProto.INT8}


def test_quantised_activations_for_something_else_are_refused(tmp_path: Path) -> None:
    model = model_of("DynamicQuantizeLinear", {"x": normal(2, 3)}, {}, ["x"], ("q", "s", "z"), "")
    model.graph.node.append(onnx.helper.make_node("Cast", ["q"], ["y"], to=onnx.TensorProto.FLOAT))
    with pytest.raises(ChaiError, match=r"uses DynamicQuantizeLinear for Cast \(a node\)"):
        lower_operators(model, tmp_path, tmp_path / "integers.data", "integers.data")
