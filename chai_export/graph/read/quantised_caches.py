"""Caches that a file holds in 8 or 4 bits, taken as floats: a bundle stores its own rows in its own bits.

onnxruntime's ``GroupQueryAttention`` with ``k_quant_type`` and ``v_quant_type`` rounds new rows by scales
that are weights of the file, and reads them back by the same scales. Without both it is the same attention on
rows as they were computed, which is what the file approximates.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from chai_export.graph.read.unfuse import MICROSOFT

_KINDS = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
_SCALES = (12, 13)
_CODES = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4})


def has_quantised_caches(graph: ir.Graph) -> bool:
    """Whether a graph takes codes where attention has its caches."""
    return any(value.dtype in _CODES for node in _attentions(graph) for value in _caches(node))


def take_caches_as_floats(graph: ir.Graph) -> None:
    """Give quantised caches the type that attention computes with."""
    for node in _attentions(graph):
        if any(value.dtype in _CODES for value in _caches(node)):
            _take_off(node, graph)


def _attentions(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.domain == MICROSOFT and node.op_type == "GroupQueryAttention")


def _caches(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs[3:5], *node.outputs[1:3]) if value is not None]


def _take_off(node: ir.Node, graph: ir.Graph) -> None:
    computed = node.inputs[0].dtype if node.inputs[0] is not None else None
    computed = computed or graph.outputs[0].dtype
    dim = _head_dim(node)
    for value in _caches(node):
        if computed is not None:
            value.type = ir.TensorType(computed)
        if value.shape is not None and dim is not None:
            value.shape = ir.Shape([*value.shape.dims[:-1], dim])  # two codes share a byte in 4 bits
    for name in _KINDS:
        node.attributes.pop(name, None)
    for index in _SCALES:
        if index < len(node.inputs):
            node.replace_input_with(index, None)


def _head_dim(node: ir.Node) -> int | None:
    """D, from the width of the keys, or of query, key and value if they come as one."""
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    packed = node.inputs[1] is None
    value = node.inputs[0] if packed else node.inputs[1]
    width = value.shape[-1] if value is not None and value.shape is not None else None
    rows = heads + 2 * kv_heads if packed else kv_heads
    return width // rows if isinstance(width, int) and width % rows == 0 else None
