"""Compute logits only where they are wanted: gather hidden states at output_positions before the head."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.read.builder import Builder
from chai_export.graph.read.constants import rank

# Operators of a language model head that treat each token by itself.
_PER_TOKEN = frozenset(
    {"Add", "Sub", "Mul", "Div", "Cast", "Tanh", "MatMul", "MatMulNBits", "Clip", "Identity", "Neg"}
)


def select_outputs(builder: Builder, logits: ir.Value, positions: ir.Value) -> ir.Value:
    """Return logits [B, N, V] at ``positions`` int64 [B, N], from logits [B, S, V].

    1. From the logits upwards go operators that treat every token alike, each with one computed operand.
    2. The gather goes above the first MatMul with a weight, which is the head.
    3. Where no such head is found the finished logits are gathered: right as well, only slower.

    Raises:
        ChaiError: the logits have no [B, S, V] shape.
    """
    if rank(logits) not in (None, 3):
        raise ChaiError(
            f"the output {logits.name} has rank {rank(logits)} instead of 3 [batch, tokens, vocabulary]; "
            "export the logits of all tokens"
        )
    index = builder.op("Unsqueeze", positions, builder.integers(2))
    head = _head(logits)
    if head is None:
        return builder.op("GatherND", logits, index, batch_dims=1, name="logits")
    node, operand = head
    hidden = node.inputs[operand]
    assert hidden is not None
    selected = builder.op("GatherND", hidden, index, batch_dims=1, name="selected_hidden_states")
    selected.type = hidden.type
    node.replace_input_with(operand, selected)
    return logits


def _head(logits: ir.Value) -> tuple[ir.Node, int] | None:
    """The MatMul of the head and which operand is the hidden state [B, S, E]."""
    value = logits
    while True:
        node = value.producer()
        if node is None or node.op_type not in _PER_TOKEN or node.domain not in ("", "com.microsoft"):
            return None
        computed = [i for i, item in enumerate(node.inputs) if item is not None and not _is_fixed(item)]
        if len(computed) != 1 or len(node.outputs[0].uses()) > 1:
            return None
        source = node.inputs[computed[0]]
        assert source is not None
        if node.op_type in ("MatMul", "MatMulNBits"):
            return (node, 0) if computed[0] == 0 and rank(source) == 3 else None
        value = source


def _is_fixed(value: ir.Value) -> bool:
    """A weight, or a weight that is transposed or cast at run time."""
    if value.is_initializer():
        return True
    node = value.producer()
    return (
        node is not None
        and node.op_type in ("Transpose", "Cast")
        and node.inputs[0] is not None
        and _is_fixed(node.inputs[0])
    )
