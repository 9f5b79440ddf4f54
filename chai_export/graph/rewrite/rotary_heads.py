"""Write down how many heads com.microsoft's RotaryEmbedding turns, where it is left to be worked out."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.read.constants import rank, static_dim
from chai_export.graph.read.sizes import last_dim
from chai_export.graph.read.unfuse import MICROSOFT


def state_rotary_heads(graph: ir.Graph) -> None:
    """Give every RotaryEmbedding of [B,S,H·D] its ``num_heads``, in place; nothing changes for onnxruntime.

    If it is 0 onnxruntime takes the width of a head from the tables; TensorRT divides by it.
    """
    for node in graph:
        if node.domain != MICROSOFT or node.op_type != "RotaryEmbedding" or rank(node.inputs[0]) == 4:
            continue
        given = node.attributes.get("num_heads")
        half, width = static_dim(node.inputs[2], 1), last_dim(node.inputs[0])
        if (given is None or given.as_int() == 0) and half and width and width % (2 * half) == 0:
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", width // (2 * half))
