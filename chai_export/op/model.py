"""A model of one op node, every dim symbolic: what tests, probes and benchmarks run."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import helper

from chai_export.op.attributes import Attributes
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.function import Form, function_proto
from chai_export.op.schema import DOMAIN, OP_TYPE, signature
from chai_export.op.signature import Parameter, Signature
from chai_export.op.storage import Storage


def node_model(
    attributes: Attributes,
    dtype: str,
    *,
    sinks: bool = False,
    slopes: bool = False,
    opset: int = 18,
    with_function: bool = True,
    op_type: str = OP_TYPE,
) -> onnx.ModelProto:
    """A model whose graph is one node of an op, ClusteredHeadAttention by default.

    Args:
        attributes: of the node.
        dtype: T: float32, float16 or bfloat16.
        sinks: whether the node has sinks.
        slopes: whether it has alibi slopes.
        opset: of the default domain.
        with_function: put the function body in; without it a library must provide the op.
        op_type: which op.
    """
    form = Form.of(attributes, sinks=sinks, slopes=slopes)
    element = ELEMENT_TYPES[dtype].numpy
    width = attributes.group * 2  # any that the group divides: only the dtypes are asked for
    return one_node_model(
        signature(op_type),
        attributes.as_onnx(),
        {
            "T": dtype,
            "K": Storage(attributes.key_bits, width, attributes.group).dtype(element).name,
            "V": Storage(attributes.value_bits, width, attributes.group).dtype(element).name,
        },
        opset=opset,
        function=function_proto(opset, form, op_type) if with_function else None,
        absent=form.absent(op_type),
    )


def one_node_model(
    of: Signature,
    attributes: Mapping[str, float | int],
    types: Mapping[str, str],
    *,
    opset: int = 18,
    function: onnx.FunctionProto | None = None,
    absent: Collection[str] = (),
) -> onnx.ModelProto:
    """A model whose graph is one node of a signature.

    Args:
        of: the signature.
        attributes: all attributes of the node.
        types: dtype of each type variable that has a choice.
        opset: of the default domain.
        function: the body; without it a library must provide the op.
        absent: optional inputs and outputs that the node does not have.
    """
    fixed = {name: options[0] for name, options in of.types.items() if len(options) == 1}
    types = {**fixed, **types}

    def named(parameters: Collection[Parameter]) -> list[str]:
        return ["" if parameter.name in absent else parameter.name for parameter in parameters]

    def infos(parameters: Collection[Parameter]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                parameter.name,
                ELEMENT_TYPES[types[parameter.type]].onnx,
                list(parameter.dims),
            )
            for parameter in parameters
            if parameter.name not in absent
        ]

    node = helper.make_node(of.op_type, named(of.inputs), named(of.outputs), domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    if function is not None:
        node.overload = function.overload
    graph = helper.make_graph([node], "clustered_head_attention", infos(of.inputs), infos(of.outputs))
    return helper.make_model(
        graph,
        functions=[] if function is None else [function],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, of.version)],
        ir_version=10,
    )
