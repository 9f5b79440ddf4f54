"""A model of one op node, every dim symbolic: what tests, probes and benchmarks run."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from chai_export.op.cases import numpy_dtype
from chai_export.op.function import function_proto
from chai_export.op.schema import DOMAIN, OP_TYPE, SIGNATURES, VERSION

_DIMS = {
    "query": "B H S D",
    "key": "B G S D",
    "value": "B G S Dv",
    "past_key": "B R C D",
    "past_value": "B G C Dv",
    "key_cache": "B R C D",
    "value_cache": "B G C Dv",
    "kept_head_map": "B H",
    "past_head_map": "B H",
    "past_lengths": "B",
    "lengths": "B",
    "output": "B S HDv",
    "present_key": "B R C D",
    "present_value": "B G C Dv",
    "present_head_map": "B H",
}
_INTEGERS = ("kept_head_map", "past_head_map", "past_lengths", "lengths", "present_head_map")


def node_model(
    attributes: Mapping[str, float | int],
    dtype: str,
    *,
    opset: int = 18,
    with_function: bool = True,
    op_type: str = OP_TYPE,
) -> onnx.ModelProto:
    """A model whose graph is one node of an op, ClusteredHeadAttention by default.

    Args:
        attributes: ``scale``, ``probe_tokens`` and ``online``.
        dtype: of the float inputs and outputs: float32, float16 or bfloat16.
        opset: of the default domain.
        with_function: put the function body in; without it a library must provide the op.
    """
    element = helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype))

    def info(name: str) -> onnx.ValueInfoProto:
        type_ = TensorProto.INT32 if name in _INTEGERS else element
        return helper.make_tensor_value_info(name, type_, _DIMS[name].split())

    inputs, outputs = SIGNATURES[op_type]
    node = helper.make_node(op_type, inputs, outputs, domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    graph = helper.make_graph([node], "clustered_head_attention", [*map(info, inputs)], [*map(info, outputs)])
    return helper.make_model(
        graph,
        functions=[function_proto(opset, op_type)] if with_function else [],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
