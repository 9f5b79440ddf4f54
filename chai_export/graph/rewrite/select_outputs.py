"""Compute logits only where they are wanted: gather hidden states at output_positions before the head."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.prove.evaluate import EvaluationError, cut
from chai_export.graph.read.builder import Builder
from chai_export.graph.read.constants import integers, rank, static_dim
from chai_export.graph.read.sizes import last_dim

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
_PRODUCTS = frozenset({"MatMul", "MatMulNBits", "Gemm"})
_SIZES = (Sizes(1, 4, 0), Sizes(1, 3, 2))


def select_outputs(builder: Builder, logits: ir.Value, positions: ir.Value, roles: Roles) -> ir.Value:
    """Return logits [B, N, V] at ``positions`` int64 [B, N], from logits [B, S, V], or of the last token.

    1. From the logits upwards go operators that treat every token alike, each with one computed operand.
    2. The gather goes above the first MatMul with a weight, which is the head; where the hidden states are
       quantised for it, above that, so that their scale is that of the chosen tokens.
    3. Where the graph takes the last token itself, before the head or behind it, the gather takes its place.
    4. Where no such head is found the finished logits are gathered: right as well, only slower.

    Raises:
        ChaiError: the logits are neither those of all tokens nor of the last one.
    """
    last = _last_token(builder.graph, logits, roles)
    if last is None:
        return _at(builder, logits, positions)
    source, selected = last.inputs[0], last.outputs[0]
    assert source is not None
    if _head(source) is not None:  # the last of all logits
        ir.convenience.replace_all_uses_with(selected, source, replace_graph_outputs=True)
        return _at(builder, source if selected is logits else logits, positions)
    gathered = _gather(builder, source, positions)
    if _keeps_rank(last):
        ir.convenience.replace_all_uses_with(selected, gathered)
        return logits
    # A head of [B, E] takes [B·N, E] as well.
    flat = builder.op("Reshape", gathered, builder.integers(-1, _width(source)), name="selected_rows")
    flat.type = source.type
    ir.convenience.replace_all_uses_with(selected, flat)
    shape = builder.op("Concat", builder.op("Shape", positions), builder.integers(_width(logits)), axis=0)
    return builder.op("Reshape", logits, shape, name="logits")


def _width(value: ir.Value) -> int:
    width = last_dim(value)
    if width is None:
        raise ChaiError(f"the graph does not state the width of {value.name}; run onnx shape inference on it")
    return width


def _at(builder: Builder, logits: ir.Value, positions: ir.Value) -> ir.Value:
    """Logits of all tokens, computed at ``positions`` only."""
    if rank(logits) not in (None, 3) or static_dim(logits, 1) == 1:
        raise ChaiError(
            f"the output {logits.name} has shape {logits.shape} instead of [batch, tokens, vocabulary]; "
            "export the logits of all tokens (transformers: logits_to_keep=0)"
        )
    head = _head(logits)
    if head is None:
        return _gather(builder, logits, positions, name="logits")
    node, operand = head
    hidden = node.inputs[operand]
    assert hidden is not None
    node.replace_input_with(operand, _gather(builder, hidden, positions))
    return logits


def _gather(
    builder: Builder, value: ir.Value, positions: ir.Value, name: str = "selected_hidden_states"
) -> ir.Value:
    index = builder.op("Unsqueeze", positions, builder.integers(2))
    selected = builder.op("GatherND", value, index, batch_dims=1, name=name)
    selected.type = value.type
    return selected


def _last_token(graph: ir.Graph, logits: ir.Value, roles: Roles) -> ir.Node | None:
    """The Slice or Gather above the logits that takes the last token [B, S, E] to [B, 1, E] or [B, E]."""
    value = logits
    while (node := value.producer()) is not None:
        if node.domain == "" and node.op_type in ("Slice", "Gather") and _takes_last(graph, node, roles):
            return node
        if node.op_type not in _PER_TOKEN | _PRODUCTS or (operand := _computed(node)) is None:
            return None
        value = operand[1]
    return None


def _takes_last(graph: ir.Graph, node: ir.Node, roles: Roles) -> bool:
    if node.op_type == "Gather":
        axis = node.attributes.get("axis")
        index = node.inputs[1]
        return axis is not None and axis.as_int() in (1, -2) and _is_last(graph, index, roles)
    starts, ends, axes, steps = (*node.inputs[1:], None, None)[:4]
    if integers(axes) not in ([1], [-2]) or (steps is not None and integers(steps) != [1]):
        return False
    end = integers(ends)
    return _is_last(graph, starts, roles) and end is not None and len(end) == 1 and end[0] >= 2**31 - 1


def _keeps_rank(node: ir.Node) -> bool:
    return node.op_type == "Slice" or rank(node.inputs[1]) == 1


def _is_last(graph: ir.Graph, index: ir.Value | None, roles: Roles) -> bool:
    """Whether a number is -1, or S - 1 whatever the sizes are."""
    known = integers(index)
    if known is not None or index is None:
        return known == [-1]
    try:
        part = cut(graph, [], [index], roles)
        for sizes in _SIZES:
            feeds = roles.feeds(sizes, np.ones((1, sizes.total), np.int64))
            (found,) = part.run(roles, sizes, {v: array for v, array in feeds.items() if v in part.inputs})
            if np.size(found) != 1 or int(np.ravel(found)[0]) not in (-1, sizes.tokens - 1):
                return False
    except EvaluationError:
        return False
    return True


def _head(logits: ir.Value) -> tuple[ir.Node, int] | None:
    """The MatMul of the head and which operand is the hidden state [B, S, E]."""
    value = logits
    while True:
        node = value.producer()
        if node is None or node.op_type not in _PER_TOKEN or node.domain not in ("", "com.microsoft"):
            return None
        computed = _computed(node)
        if computed is None or len(node.outputs[0].uses()) > 1:
            return None
        index, source = computed
        if node.op_type in _PRODUCTS:
            return (node, 0) if index == 0 and rank(source) == 3 else None
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


def _computed(node: ir.Node) -> tuple[int, ir.Value] | None:
    """The one operand that is no weight, with its place."""
    found = [(i, item) for i, item in enumerate(node.inputs) if item is not None and not _is_fixed(item)]
    return found[0] if len(found) == 1 else None


def _is_fixed(value: ir.Value) -> bool:
    """A weight, also one that is transposed, cast or dequantised; or the scale of quantised hidden states."""
    if value.is_initializer():
        return True
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "DynamicQuantizeLinear":
        return value is not node.outputs[0]
    if node.op_type == "DequantizeLinear":
        return node.inputs[0] is not None and _is_fixed(node.inputs[0])
    if node.op_type not in ("Transpose", "Cast", "Mul"):
        return False
    return all(item is not None and _is_fixed(item) for item in node.inputs)
