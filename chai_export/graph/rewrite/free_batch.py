"""Graphs that were exported for a batch of one row: let them take any number of rows.

Such a graph has a 1 where others compute the batch size. In the target of a Reshape whose input has one row
it becomes a 0, which copies the row count of the input: for one row nothing changes. Elsewhere a 1 is
stretched by broadcasting. Whether that was enough is for the comparison of the whole model, which runs
several rows.
"""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.read.builder import Builder
from chai_export.graph.read.constants import integers, rank, static_dim


def free_batch(builder: Builder) -> None:
    """Let every Reshape of one row keep its row count, and forget that values have one row; in place."""
    for node in list(builder.graph):
        if node.op_type == "Reshape" and node.domain == "" and static_dim(node.inputs[0], 0) == 1:
            _keep_rows(builder, node)
    values = [output for node in builder.graph for output in node.outputs]
    for value in [*builder.graph.inputs, *values]:
        if (rank(value) or 0) > 1 and value.shape is not None and value.shape[0] == 1:
            value.shape = ir.Shape([None, *value.shape[1:]])


def _keep_rows(builder: Builder, node: ir.Node) -> None:
    """A target that begins with 1 begins with 0 instead, unless a 0 means no elements there."""
    allow = node.attributes.get("allowzero")
    literal_zeros = allow is not None and allow.as_int() == 1
    target = node.inputs[1]
    known = integers(target)
    if known is not None:
        if known[:1] == [1] and not (literal_zeros and 0 in known):
            node.replace_input_with(1, builder.integers(0, *known[1:]))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        return
    parts = target.producer() if target is not None else None
    joined = parts is not None and parts.op_type == "Concat" and not literal_zeros
    if parts is not None and joined and integers(parts.inputs[0]) == [1]:
        node.replace_input_with(1, builder.op("Concat", builder.integers(0), *parts.inputs[1:], axis=0))
