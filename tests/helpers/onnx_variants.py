"""What people do to an exported decoder: quantise it, convert it, let ONNX Runtime fuse it, merge it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.transformers.float16 import convert_float_to_float16

INTEGER_INPUTS = ("input_ids", "attention_mask", "position_ids", "cache_position")


def int32_inputs(source: Path, target: Path) -> Path:
    """Integer inputs as int32, cast to what the graph wants."""
    model = onnx.load(source)
    casts = []
    for value in model.graph.input:
        if value.name in INTEGER_INPUTS:
            value.type.tensor_type.elem_type = TensorProto.INT32
            casts.append(helper.make_node("Cast", [value.name], [f"{value.name}_long"], to=TensorProto.INT64))
            for node in model.graph.node:
                node.input[:] = [f"{name}_long" if name == value.name else name for name in node.input]
    for node in reversed(casts):
        model.graph.node.insert(0, node)
    onnx.save(model, target)
    return target


def fix_token_ids(source: Path, target: Path, sizes: tuple[int | None, int | None]) -> Path:
    """State rows and tokens of input_ids as numbers."""
    model = onnx.load(source)
    dims = next(v for v in model.graph.input if v.name == "input_ids").type.tensor_type.shape.dim
    for dim, size in zip(dims, sizes, strict=True):
        if size is not None:
            dim.dim_value = size
    onnx.save(model, target)
    return target


def last_token(source: Path, target: Path, how: str) -> Path:
    """Logits of the last token only.

    ``how``: "slice" [B,1,V] or "gather" [B,V] before the head, "after" it, "counted" by the number of tokens;
    "first" is another token.
    """
    model = onnx.load(source)
    graph = model.graph
    head = next(node for node in graph.node if "logits" in node.output)
    logits = next(value for value in graph.output if value.name == "logits")
    for name, numbers in (("last", [-1]), ("end", [2**63 - 1]), ("axis", [1]), ("minus_one", -1)):
        graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    at = list(graph.node).index(head)
    if how == "after":
        head.output[0] = "all_logits"
        graph.node.append(helper.make_node("Slice", ["all_logits", "last", "end", "axis"], ["logits"]))
    elif how == "slice":
        node = helper.make_node("Slice", [head.input[0], "last", "end", "axis"], ["last_hidden"])
        graph.node.insert(at, node)
        head.input[0] = "last_hidden"
    else:
        index = "minus_one"
        if how == "first":
            index = "zero"
            graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), index))
        elif how == "counted":
            index = "count_minus_one"
            graph.node.insert(at, helper.make_node("Add", ["count", "minus_one"], [index]))
            graph.node.insert(at, helper.make_node("Squeeze", ["counts"], ["count"]))
            graph.node.insert(at, helper.make_node("Shape", ["input_ids"], ["counts"], start=1, end=2))
        node = helper.make_node("Gather", [head.input[0], index], ["last_hidden"], axis=1)
        graph.node.insert(list(graph.node).index(head), node)
        head.input[0] = "last_hidden"
        del logits.type.tensor_type.shape.dim[1]
    if how in ("slice", "after"):
        logits.type.tensor_type.shape.dim[1].dim_value = 1
    del graph.value_info[:]
    onnx.save(model, target)
    return target


def fused(source: Path, target: Path) -> Path:
    """What ONNX Runtime saves of a session with extended optimisations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return target


def half_inside(source: Path, target: Path) -> Path:
    """float16 with ``keep_io_types``: inputs and outputs stay float32, with casts behind and before them."""
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx.save(convert_float_to_float16(model, keep_io_types=True), target)
    return target


def dynamic_int8(source: Path, target: Path, **options: object) -> Path:
    """onnxruntime's ``quantize_dynamic`` as it is called in its documentation."""
    with contextlib.redirect_stdout(io.StringIO()):
        quantization.quantize_dynamic(source, target, **options)
    return target


class _Prompts(quantization.CalibrationDataReader):
    """A few random prompts after a few cached tokens."""

    def __init__(self, path: Path) -> None:
        self._calls = iter(_calls(path))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._calls, None)


def _calls(path: Path) -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for _ in range(2):
        feeds: dict[str, np.ndarray] = {
            "input_ids": generator.integers(0, 60, (1, 5)),
            "attention_mask": np.ones((1, 8), np.int64),
            "position_ids": np.arange(3, 8)[None],
        }
        for value in session.get_inputs():
            if "past" in value.name:
                shape = (1, value.shape[1], 3, value.shape[3])
                feeds[value.name] = generator.standard_normal(shape, np.float32)
        yield {value.name: feeds[value.name] for value in session.get_inputs()}


def _computed_products(graph: onnx.GraphProto) -> list[str]:
    """Names of the MatMuls without a weight."""
    stored = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and not stored & set(node.input)]


def static_int8(source: Path, target: Path, form: str, *, attention: bool) -> Path:
    """onnxruntime's ``quantize_static``: ``form`` "QDQ" or "QOperator", with or without attention itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        quantization.quantize_static(
            source,
            target,
            _Prompts(source),
            quant_format=quantization.QuantFormat[form],
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[] if attention else _computed_products(onnx.load(source).graph),
        )
    return target


def merged(source: Path, target: Path) -> Path:
    """optimum's merged decoder: an If on ``use_cache_branch`` over the model with and without a past."""
    model = onnx.load(source)
    graph = model.graph
    pasts = [value for value in graph.input if value.name.startswith("past")]
    outputs = list(graph.output)

    def branch(suffix: str) -> onnx.GraphProto:
        names = {name: f"{name}{suffix}" for node in graph.node for name in node.output if name}
        nodes = []
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{node.name}{suffix}"
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names.get(name, name) for name in node.output]
            nodes.append(copy)
        results = []
        for value in outputs:
            result = onnx.ValueInfoProto()
            result.CopyFrom(value)
            result.name = names[value.name]
            results.append(result)
        return helper.make_graph(nodes, f"decoder{suffix}", [], results)

    with_past, without = branch("_with_past"), branch("_without")
    for value in pasts:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        empty = numpy_helper.from_array(
            np.zeros((1, shape[1], 0, shape[3]), np.float32), f"{value.name}_empty"
        )
        without.node.insert(0, helper.make_node("Constant", [], [f"{value.name}_empty"], value=empty))
        for node in without.node:
            node.input[:] = [f"{value.name}_empty" if name == value.name else name for name in node.input]
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    choice = helper.make_node(
        "If",
        [flag.name],
        [value.name for value in outputs],
        name="optimum::if",
        then_branch=with_past,
        else_branch=without,
    )
    whole = helper.make_graph([choice], "merged", [*graph.input, flag], outputs, list(graph.initializer))
    onnx.save(helper.make_model(whole, opset_imports=model.opset_import, ir_version=model.ir_version), target)
    return target


def quantise_operand(graph: onnx.GraphProto, node: onnx.NodeProto, slot: int) -> None:
    """Put QuantizeLinear and DequantizeLinear in front of one input."""
    for name, array in (("step", np.array(0.01, np.float32)), ("middle", np.array(128, np.uint8))):
        graph.initializer.append(numpy_helper.from_array(array, name))
    at = list(graph.node).index(node)
    graph.node.insert(
        at, helper.make_node("QuantizeLinear", [node.input[slot], "step", "middle"], ["q"], name="Q")
    )
    graph.node.insert(
        at + 1, helper.make_node("DequantizeLinear", ["q", "step", "middle"], ["dq"], name="DQ")
    )
    node.input[slot] = "dq"


def take_first_row(graph: onnx.GraphProto) -> None:
    """Let the hidden states pass through their first row, which stands for all."""
    head = next(node for node in graph.node if "logits" in node.output)
    for name, array in (("row", np.array(0)), ("front", np.array([0]))):
        graph.initializer.append(numpy_helper.from_array(array.astype(np.int64), name))
    at = list(graph.node).index(head)
    graph.node.insert(at, helper.make_node("Gather", [head.input[0], "row"], ["first_row"], axis=0))
    graph.node.insert(at + 1, helper.make_node("Unsqueeze", ["first_row", "front"], ["one_row"]))
    head.input[0] = "one_row"
