"""A model of one op node, every dim symbolic: what tests, probes and benchmarks run."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import helper

from chai_export.op.cases import numpy_dtype
from chai_export.op.function import function_proto
from chai_export.op.schema import DOMAIN, OP_TYPE, VERSION, signature
from chai_export.op.signature import Parameter

_FIXED_TYPES = {"M": "int32", "F": "float16", "A": "float32"}


def node_model(
    attributes: Mapping[str, float | int],
    dtype: str,
    *,
    opset: int = 18,
    with_function: bool = True,
    op_type: str = OP_TYPE,
    version: int = VERSION,
    stored: Mapping[str, str] | None = None,
    absent: Collection[str] = (),
) -> onnx.ModelProto:
    """A model whose graph is one node of an op, ClusteredHeadAttention by default.

    Args:
        attributes: all attributes of the node.
        dtype: T, the type of the float inputs and outputs: float32, float16 or bfloat16.
        opset: of the default domain.
        with_function: put the function body in; without it a library must provide the op.
        op_type: which op.
        version: of the op.
        stored: dtypes of the type variables of caches ("K", "V"), T where they are not named.
        absent: optional inputs and outputs that the node does not have.
    """
    of = signature(op_type, version)
    types = {"T": dtype, "K": dtype, "V": dtype, **_FIXED_TYPES, **(stored or {})}

    def named(parameters: Collection[Parameter]) -> list[str]:
        return ["" if parameter.name in absent else parameter.name for parameter in parameters]

    def infos(parameters: Collection[Parameter]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                parameter.name,
                helper.np_dtype_to_tensor_dtype(numpy_dtype(types[parameter.type])),
                list(parameter.dims),
            )
            for parameter in parameters
            if parameter.name not in absent
        ]

    node = helper.make_node(op_type, named(of.inputs), named(of.outputs), domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    graph = helper.make_graph([node], "clustered_head_attention", infos(of.inputs), infos(of.outputs))
    return helper.make_model(
        graph,
        functions=[function_proto(opset, op_type)] if with_function else [],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, version)],
        ir_version=10,
    )
