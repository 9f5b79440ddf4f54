"""Take the quantisation of activations out of a graph, for comparisons.

int4 graphs (MatMulNBits with accuracy level 4) and those of ``quantize_dynamic`` round activations to 8 bits
with a scale that depends on everything in the call, so the same graph gives other logits in another batch:
by up to 2 where its neighbours are 0.3 apart. With exact activations the same weights give the same logits
up to float32's rounding. Both sides of a comparison are edited alike; what is written and run is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from chai_export.graph.read.builder import Builder
from chai_export.graph.weights.block_weight import BlockWeight, block_weight

_MICROSOFT = "com.microsoft"
_EXACT_LEVEL = 1
"""Of MatMulNBits: activations in float32. 0 leaves it to ONNX Runtime, 4 is int8."""


def quantises_activations(graph: ir.Graph) -> bool:
    """Whether :func:`exact_activations` would change the graph."""
    return any(_edit(node) is not None for node in graph)


def exact_activations(model: ir.Model) -> None:
    """Let every product of the main graph read its activations unrounded, in place.

    1. MatMulNBits computes in float32; with 8 bits it becomes a MatMul with the numbers that the codes stand
       for, since ONNX Runtime takes hundreds of times as long for that.
    2. Behind DynamicQuantizeLinear the integer product becomes a float one: the activations stay as they
       are with scale 1, the weights become floats less their zero point.
    3. The fused forms of 2 (DynamicQuantizeMatMul, MatMulIntegerToFloat) become their parts.
    4. A QuantizeLinear that is directly undone goes.
    """
    builder = Builder(model.graph)
    for node in list(model.graph):
        edit = _edit(node)
        if edit is not None:
            edit(builder, node)
    model.graph.sort()
    common.RemoveUnusedNodesPass()(model)


_Edit = Callable[[Builder, ir.Node], None]


def _edit(node: ir.Node) -> _Edit | None:
    if node.domain == _MICROSOFT:
        return _fused_edit(node)
    if node.domain != "":
        return None
    if node.op_type == "MatMulInteger" and _quantiser(node.inputs[0]) is not None:
        return _product_in_float
    if node.op_type == "DynamicQuantizeLinear":
        return _scale_of_one
    if node.op_type == "DequantizeLinear" and _static_quantiser(node) is not None:
        return _without_the_pair
    return None


def _fused_edit(node: ir.Node) -> _Edit | None:
    if node.op_type == "MatMulNBits":
        level = node.attributes.get("accuracy_level")
        return None if level is not None and level.as_int() == _EXACT_LEVEL else _exact_level
    if node.op_type == "DynamicQuantizeMatMul":
        return _take_apart_dynamic
    if node.op_type == "MatMulIntegerToFloat" and _quantiser(node.inputs[0]) is not None:
        return _take_apart_to_float
    return None


def _exact_level(builder: Builder, node: ir.Node) -> None:
    weight, stored = block_weight(node), node.inputs[1]
    if weight is not None and stored is not None and weight.bits == 8:
        result = builder.op("MatMul", node.inputs[0], _numbers(builder, str(stored.name), weight))
        result.shape = node.outputs[0].shape
        _replace(node, result, node.outputs[0].dtype)
        return
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _EXACT_LEVEL)


def _numbers(builder: Builder, name: str, weight: BlockWeight) -> ir.Value:
    """[in, out] in the type of the scales, made when it is read."""
    unique = f"{name}.numbers"
    if unique in builder.graph.initializers:
        return builder.graph.initializers[unique]
    dtype = ir.DataType.from_numpy(weight.scales.dtype)

    def read() -> ir.TensorProtocol:
        numbers = weight.dequantised().T.astype(weight.scales.dtype)
        return ir.Tensor(np.ascontiguousarray(numbers), name=unique)

    shape = ir.Shape([weight.width, len(weight.blocks)])
    lazy = ir.LazyTensor(read, dtype=dtype, shape=shape, cache=False, name=unique)
    value = ir.Value(name=unique, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
    builder.graph.register_initializer(value)
    return value


def _scale_of_one(builder: Builder, node: ir.Node) -> None:
    """Readers of the scale get 1; the quantised activations and their zero point lose their readers."""
    scale = node.outputs[1]
    if scale.uses():
        one = builder.op("Constant", value=ir.tensor(1.0, dtype=ir.DataType.FLOAT))
        one.type = ir.TensorType(ir.DataType.FLOAT)
        ir.convenience.replace_all_uses_with(scale, one)


def _product_in_float(builder: Builder, node: ir.Node) -> None:
    activations = _quantiser(node.inputs[0])
    assert activations is not None
    weights = _shifted(builder, node.inputs[1], _input(node, 3))
    _replace(node, builder.op("MatMul", activations, weights))


def _take_apart_dynamic(builder: Builder, node: ir.Node) -> None:
    """Inputs: A, B, scale of B, zero point of B, bias."""
    _finish(builder, node, node.inputs[0], _shifted(builder, node.inputs[1], _input(node, 3)), 2, 4)


def _take_apart_to_float(builder: Builder, node: ir.Node) -> None:
    """Inputs: A, B, scales of A and B, zero points of A and B, bias."""
    weights = _shifted(builder, node.inputs[1], _input(node, 5))
    _finish(builder, node, _quantiser(node.inputs[0]), weights, 3, 6)


def _finish(
    builder: Builder, node: ir.Node, activations: ir.Value | None, weights: ir.Value, scale: int, bias: int
) -> None:
    result = builder.op("MatMul", activations, builder.op("Mul", weights, node.inputs[scale]))
    added = _input(node, bias)
    _replace(node, result if added is None else builder.op("Add", result, added))


def _without_the_pair(builder: Builder, node: ir.Node) -> None:
    source = _static_quantiser(node)
    assert source is not None
    old = node.outputs[0]
    if old.is_graph_output():  # keeps its name
        name, old.name = str(old.name), f"{old.name}/quantised"
        source = builder.op("Identity", source, outputs=(name,))
        source.type, source.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, source, replace_graph_outputs=True)


def _quantiser(value: ir.Value | None) -> ir.Value | None:
    """The activations that DynamicQuantizeLinear made ``value`` of."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "DynamicQuantizeLinear" else None


def _static_quantiser(node: ir.Node) -> ir.Value | None:
    """What stands before a QuantizeLinear that ``node`` undoes with the same scale."""
    value = node.inputs[0]
    before = None if value is None else value.producer()
    if before is None or before.op_type != "QuantizeLinear" or before.inputs[1] is not node.inputs[1]:
        return None
    return before.inputs[0]


def _shifted(builder: Builder, weights: ir.Value | None, zero_point: ir.Value | None) -> ir.Value:
    """Integer weights as floats, less their zero point."""
    floats = builder.op("Cast", weights, to=ir.DataType.FLOAT)
    if zero_point is None:
        return floats
    return builder.op("Sub", floats, builder.op("Cast", zero_point, to=ir.DataType.FLOAT))


def _replace(node: ir.Node, value: ir.Value, dtype: ir.DataType | None = ir.DataType.FLOAT) -> None:
    value.type = ir.TensorType(dtype or ir.DataType.FLOAT)
    old = node.outputs[0]
    if old.is_graph_output():  # keeps its name
        value.name, old.name = old.name, f"{old.name}/quantised"
        value.shape = old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
