"""Types of inputs and outputs as the matchers expect them, whatever a converter put around the graph."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.read.constants import rank

_CACHE_RANK = 4
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def widen_integer_inputs(graph: ir.Graph) -> None:
    """Inputs are int64; where a graph takes int32 and computes with it, a Cast stands behind the input."""
    for value in graph.inputs:
        if value.dtype == ir.DataType.INT32:
            _widen(graph, value)


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    readers = [(use.node, use.idx) for use in value.uses()]
    value.type = ir.TensorType(ir.DataType.INT64)
    narrow = ir.node("Cast", [value], {"to": ir.DataType.INT32.value}, name=f"{value.name}/int32")
    narrowed = narrow.outputs[0]
    narrowed.type, narrowed.shape = ir.TensorType(ir.DataType.INT32), value.shape
    graph.insert_before(next(iter(graph)), narrow)
    for node, index in readers:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.INT64.value:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
        elif node.op_type != "Shape":
            node.replace_input_with(index, narrowed)


def take_off_cache_casts(graph: ir.Graph) -> None:
    """Caches come and go in the type that the graph computes with.

    Converters to float16 keep the types of inputs and outputs (``keep_io_types``) by a Cast behind every
    cache that comes in and before every one that goes out. A bundle's caches hold the new rows as they are.
    """
    for value in graph.inputs:
        if rank(value) == _CACHE_RANK and value.dtype in _FLOATS:
            _retype_input(graph, value)
    for index, value in enumerate(graph.outputs):
        node = value.producer()
        source = node.inputs[0] if node is not None and _is_float_cast(node) else None
        if node is None or source is None or rank(value) != _CACHE_RANK or value.uses():
            continue
        if source.is_graph_output() or source.is_graph_input():
            continue
        graph.outputs[index] = source
        source.name, value.name = value.name, source.name
        source.shape = source.shape or value.shape
        graph.remove(node, safe=True)


def _retype_input(graph: ir.Graph, value: ir.Value) -> None:
    readers = [node for node in value.consumers() if node.op_type != "Shape"]
    casts = [node for node in readers if _is_float_cast(node)]
    types = {node.attributes["to"].as_int() for node in casts}
    if len(types) != 1 or len(casts) != len(readers):
        return
    if any(node.outputs[0].is_graph_output() for node in casts):
        return
    value.type = ir.TensorType(ir.DataType(types.pop()))
    for node in casts:
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)


def _is_float_cast(node: ir.Node) -> bool:
    """A Cast from one floating-point type to another."""
    if node.op_type != "Cast" or node.domain != "":
        return False
    return ir.DataType(node.attributes["to"].as_int()) in _FLOATS
