"""Compute logits only where they are wanted: gather hidden states at output_positions before the head."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.read.builder import Builder
from chai_export.graph.read.constants import rank

# Operators of a language model head that treat each token by itself.
_PER_TOKEN = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Cast",
        "Tanh",
        "MatMul",
        "MatMulNBits",
        "MatMulInteger",
        "Clip",
        "Identity",
        "Neg",
    }
)


def select_outputs(builder: Builder, logits: ir.Value, positions: ir.Value) -> ir.Value:
    """Return logits [B, N, V] at ``positions`` int64 [B, N], from logits [B, S, V].

    1. From the logits upwards go operators that treat every token alike, each with one computed operand.
    2. The gather goes above the first MatMul with a weight, which is the head; where the hidden states are
       quantised for it, above that, so that their scale is that of the chosen tokens.
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
        if node.op_type == "MatMulInteger":
            return _quantised_head(source)
        value = source


def _quantised_head(quantised: ir.Value) -> tuple[ir.Node, int] | None:
    """The DynamicQuantizeLinear before the head's integer product, if the head alone reads it."""
    node = quantised.producer()
    if (
        node is None
        or node.op_type != "DynamicQuantizeLinear"
        or any(len(v.uses()) > 1 for v in node.outputs)
    ):
        return None
    return (node, 0) if rank(node.inputs[0]) == 3 else None


def _is_fixed(value: ir.Value) -> bool:
    """A weight, also one that is transposed or cast at run time; or the scale of quantised hidden states."""
    if value.is_initializer():
        return True
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "DynamicQuantizeLinear":
        return value is not node.outputs[0]
    if node.op_type not in ("Transpose", "Cast", "Mul"):
        return False
    return all(item is not None and _is_fixed(item) for item in node.inputs)
