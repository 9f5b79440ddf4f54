"""The inputs of a bundle's graph (docs/how-it-works.md) and what is computed from them alone."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.bundle.graph_io import BATCH, INPUT_IDS, LENGTHS, PAST_LENGTHS, TOKENS, GraphIO
from chai_export.graph.read.builder import Builder, graph_input
from chai_export.op.dtypes import ELEMENT_TYPES

POSITIONS_NAME = "token_positions"
"""Value int64 [B, S] of a bundle's graph: the position id of each token."""


def make_inputs(input_ids: ir.Value, io: GraphIO) -> dict[str, ir.Value]:
    """The graph's inputs by name, in order; nothing is connected yet. ``input_ids`` are the source's."""
    inputs = {
        value.name: graph_input(value.name, ir.DataType(ELEMENT_TYPES[value.dtype].onnx), list(value.dims))
        for value in io.inputs
    }
    input_ids.shape = inputs[INPUT_IDS].shape
    return {**inputs, INPUT_IDS: input_ids}


def token_positions(builder: Builder, inputs: dict[str, ir.Value]) -> ir.Value:
    """Position ids int64 [B, S]: max(0, n + min(i, m-1)), see docs/how-it-works.md.

    A padded token has the position of the last valid one, so that position tables are never overrun.
    """
    one, zero = builder.integer(1), builder.integer(0)
    integer = ir.DataType.INT64.value
    tokens = builder.op(
        "Squeeze", builder.op("Shape", inputs[INPUT_IDS], start=1, end=2), builder.integers(0)
    )
    steps = builder.op("Range", zero, tokens, one)
    columns = [
        builder.op("Unsqueeze", builder.op("Cast", value, to=integer), builder.integers(1))
        for value in (inputs[LENGTHS], inputs[PAST_LENGTHS])
    ]
    last = builder.op("Sub", columns[0], one)
    position = builder.op("Add", builder.op("Min", steps, last), columns[1])
    result = builder.op("Max", position, zero, name=POSITIONS_NAME)
    result.type, result.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([BATCH, TOKENS])
    return result
