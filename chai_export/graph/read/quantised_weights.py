"""In how many bits a graph stores its matrices."""

from __future__ import annotations

from collections import Counter
from math import prod

import onnx_ir as ir

from chai_export.bundle.manifest import QuantisedWeights

_INTEGERS = {
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
}
_PRODUCTS = ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


def quantised_weights(graph: ir.Graph) -> QuantisedWeights | None:
    """The integer type that holds most numbers of the weights; None where there are no quantised weights."""
    sizes: Counter[int] = Counter()
    for node in graph:
        if node.op_type == "MatMulNBits":
            sizes[_integer(node, "bits")] += _integer(node, "K") * _integer(node, "N")
        elif node.op_type == "GatherBlockQuantized":
            sizes[_integer(node, "bits", 4)] += _elements(node.inputs[0]) * 2
        elif node.op_type in _PRODUCTS:
            sizes[8] += _elements(node.inputs[1])
        elif node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            weight = node.inputs[0]
            if weight.is_initializer() and weight.dtype in _INTEGERS:
                sizes[_INTEGERS[weight.dtype]] += _elements(weight)
    known = {bits: sizes[bits] for bits in (4, 8) if sizes[bits]}
    if not known:
        return None
    return "int4" if max(known, key=lambda bits: known[bits]) == 4 else "int8"


def _elements(value: ir.Value | None) -> int:
    if value is None or value.shape is None or not value.is_initializer():
        return 0
    return prod(dim for dim in value.shape if isinstance(dim, int))


def _integer(node: ir.Node, name: str, default: int = 0) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
