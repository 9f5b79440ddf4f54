"""Sizes of single values, from the shapes that the graph states or from the nodes that made them."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.read.constants import integers, static_dim

# Operators whose first input has the same sizes, at least on the axes of heads and head dim.
_LIKE_FIRST = frozenset(
    {"Cast", "Identity", "RotaryEmbedding", "RMSNormalization", "LayerNormalization", "Neg", "Clip"}
    | {"SimplifiedLayerNormalization"}
)
_WEIGHTS = {
    "MatMul": 1,
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
    "SkipSimplifiedLayerNormalization": 2,
    "SkipLayerNormalization": 2,
}
"""Operators as wide as the last axis of one of their operands."""
_BROADCAST = frozenset({"Add", "Sub", "Mul", "Div", "Where"})
_PIECES = frozenset({"Concat", "Slice", "Split"})
_DEEPEST = 24


def axis_size(value: ir.Value | None, axis: int, depth: int = _DEEPEST) -> int | None:
    """A dim of a rank-4 value: stated by its shape, or by the nodes that made it."""
    size = static_dim(value, axis)
    node = value.producer() if value is not None else None
    if size is not None or node is None or depth == 0:
        return size
    if node.op_type == "Reshape":
        return _target_dim(node, axis, depth)
    if node.op_type == "Transpose" and "perm" in node.attributes:
        axis = node.attributes["perm"].as_ints()[axis]
    # Rotary embedding takes heads apart along their width, never along their number.
    elif node.op_type not in _LIKE_FIRST | _BROADCAST and not (node.op_type in _PIECES and axis == 1):
        return None
    sources = node.inputs if node.op_type in _BROADCAST else node.inputs[:1]
    sizes = [axis_size(item, axis, depth - 1) for item in sources]
    return max((size for size in sizes if size is not None), default=None)


def last_dim(value: ir.Value | None, depth: int = _DEEPEST) -> int | None:  # noqa: PLR0911
    """Width of the last axis, from the value's shape or from the weights of the projection that made it."""
    size = static_dim(value, -1)
    node = value.producer() if value is not None else None
    if size is not None or node is None or depth == 0:
        return size
    if node.op_type == "MatMulNBits" and "N" in node.attributes:
        return node.attributes["N"].as_int()
    if node.op_type in _WEIGHTS:
        return static_dim(node.inputs[_WEIGHTS[node.op_type]], -1)
    if node.op_type == "Gemm" and node.domain == "":
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        return static_dim(node.inputs[1], 0 if transposed else 1)
    if node.op_type == "Split" and node.domain == "":
        parts = integers(node.inputs[1]) if len(node.inputs) > 1 else None
        return parts[node.outputs.index(value)] if parts else None
    if node.op_type == "Reshape" and node.domain == "":
        target = _target(node.inputs[1])
        return target[-1] if target and target[-1] is not None and target[-1] > 0 else None
    if node.op_type in _LIKE_FIRST:
        return last_dim(node.inputs[0], depth - 1)
    if node.op_type in _BROADCAST:
        sizes = [last_dim(item, depth - 1) for item in node.inputs]
        return max((size for size in sizes if size is not None), default=None)
    return None


def _target_dim(node: ir.Node, axis: int, depth: int) -> int | None:
    """One dim of a Reshape: a number, or what a -1 comes to when it splits off the last axis."""
    target = _target(node.inputs[1])
    if target is None or axis >= len(target):
        return None
    size = target[axis]
    if size is not None and size > 0:
        return size
    # [B, S, W] to [B, S, -1, D] or [B, S, H, -1]: heads and head dim share the old last axis.
    other = target[5 - axis] if len(target) == 4 and axis in (2, 3) else None
    if size != -1 or other is None or other <= 0:
        return None
    width = last_dim(node.inputs[0], depth - 1)
    return width // other if width is not None and width % other == 0 else None


def _target(shape: ir.Value | None) -> list[int | None] | None:
    """A Reshape target with unknown numbers as None: a constant, or a Concat of parts."""
    numbers = integers(shape)
    if numbers is not None:
        return list(numbers)
    node = shape.producer() if shape is not None else None
    if node is None or node.op_type != "Concat" or node.domain != "":
        return None
    target: list[int | None] = []
    for part in node.inputs:
        known = integers(part)
        # A part that is computed is one number in all exporters; if not, the sizes found here fail the proof.
        target += known if known is not None else [None]
    return target
