"""How many positions a rewritten graph has room for."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from chai_export.graph.read.constants import scalar
from chai_export.graph.rewrite.interface import POSITIONS_NAME

_PASSED = frozenset({"Cast", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Identity"})


def position_limit(graph: ir.Graph) -> int | None:
    """Tokens that a table of positions (learned, or precomputed cos and sin) has rows for; None without one.

    A table is an initializer that a Gather or a RotaryEmbedding reads at token positions, with a constant
    offset or without. Where rows choose between two offsets, the longer rows read farther behind.
    """
    limits = []
    for node in graph:
        for table, index in _lookups(node):
            if table is None or table.const_value is None or len(table.const_value.shape) != 2:
                continue
            offset = _offset_from_positions(index)
            if offset is not None:
                limits.append(table.const_value.shape.numpy()[0] - offset)
    return min(limits, default=None)


def _lookups(node: ir.Node) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    """Tables that a node reads by row, each with the row numbers."""
    if node.op_type == "Gather" and node.inputs:
        yield node.inputs[0], node.inputs[1]
    if node.op_type == "RotaryEmbedding" and len(node.inputs) == 4:
        # onnxruntime's own operator has the positions in front of the tables, the standard one behind.
        positions, tables = (1, (2, 3)) if node.domain else (3, (1, 2))
        for table in tables:
            yield node.inputs[table], node.inputs[positions]


def _offset_from_positions(value: ir.Value | None) -> int | None:
    """c if ``value`` is the graph's token positions plus c, through casts and reshapes; else None."""
    offset = 0
    while value is not None:
        if value.name == POSITIONS_NAME:
            return offset
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Add":
            numbers = [scalar(item) for item in node.inputs]
            if (numbers[0] is None) == (numbers[1] is None):
                return None
            constant_first = numbers[0] is not None
            offset += int(numbers[0] if numbers[0] is not None else numbers[1] or 0)
            value = node.inputs[1 if constant_first else 0]
        elif node.op_type in _PASSED:
            value = node.inputs[0]
        elif node.op_type == "Where":
            offsets = [_offset_from_positions(choice) for choice in node.inputs[1:]]
            known = [choice for choice in offsets if choice is not None]
            return offset + max(known) if len(known) == len(offsets) else None
        else:
            return None
    return None
