"""A model of one node of version 2, every dim symbolic: what tests, probes and benchmarks run."""

from __future__ import annotations

import onnx

from chai_export.op.cache_storage import PAGED_VERSION
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.model import one_node_model
from chai_export.op.schema import OP_TYPE, signature
from chai_export.op.v2.attributes import Attributes
from chai_export.op.v2.function import Form, function_proto
from chai_export.op.v2.storage import Storage


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
        signature(op_type, PAGED_VERSION),
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
