"""Fused norms whose input and scale are of different dtypes become norms of one.

onnxscript fuses ``norm(x.float()) * (1 + weight.float())`` of a 16-bit model (Gemma, Nemotron) into one
RMSNormalization that reads ``x`` in 16 bits and the scale in float32. ONNX says that the result has the
scale's dtype, its checker and ONNX Runtime that it has the input's, and the next operator gets both.
"""

from __future__ import annotations

import onnx_ir as ir

_WIDTH = {ir.DataType.FLOAT16: 16, ir.DataType.BFLOAT16: 16, ir.DataType.FLOAT: 32, ir.DataType.DOUBLE: 64}


def align_norm_types(model: ir.Model) -> None:
    """Let every RMSNormalization read input and scale in the wider of their dtypes, in place.

    The result keeps the dtype that it had before the fusion: the scale's.
    """
    for node in list(model.graph):
        if node.op_type != "RMSNormalization" or node.domain != "":
            continue
        value, scale = node.inputs[0], node.inputs[1]
        if value is None or scale is None or value.dtype is None or scale.dtype is None:
            continue
        if value.dtype == scale.dtype:
            continue
        wide = max(value.dtype, scale.dtype, key=lambda dtype: _WIDTH[dtype])
        for index, narrow in enumerate((value, scale)):
            if narrow.dtype != wide:
                node.replace_input_with(index, _cast(model.graph, node, narrow, wide, after=False))
        result = node.outputs[0]
        if wide != scale.dtype:
            readers = list(result.uses())
            back = _cast(model.graph, node, result, scale.dtype, after=True)
            for use in readers:
                use.node.replace_input_with(use.idx, back)
        result.dtype = wide


def _cast(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType, *, after: bool) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": dtype})
    made = cast.outputs[0]
    made.name, made.dtype, made.shape = (
        f"{value.name}.as_{dtype.name.lower()}.{node.name}",
        dtype,
        value.shape,
    )
    if after:
        graph.insert_after(node, cast)
    else:
        graph.insert_before(node, cast)
    return made
