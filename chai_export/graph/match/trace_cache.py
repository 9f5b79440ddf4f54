"""From keys and values, as attention reads them, upwards to the cache that new rows are appended to."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.match.miss import DYNAMIC, NoMatch, Reached
from chai_export.graph.match.quantised import OPERATORS, quantised
from chai_export.graph.match.site import CachedHeads
from chai_export.graph.read.constants import rank, scalar, static_dim

# Nodes that only move, repeat or retype data. Whether they move it rightly is for the numerical proof.
_MOVES = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Cast", "Tile", "Identity"})


def strip_scale(value: ir.Value) -> tuple[ir.Value, float]:
    """Walk up through multiplications and divisions by one number; return what is above and their product."""
    scale = 1.0
    while (step := _scale_step(value)) is not None:
        value, factor = step
        scale *= factor
    return value, scale


def _scale_step(value: ir.Value) -> tuple[ir.Value, float] | None:
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    left, right = node.inputs[:2]
    factor = scalar(right)
    if factor is not None and left is not None:
        if node.op_type == "Mul":
            return left, factor
        return (left, 1.0 / factor) if factor else None
    factor = scalar(left)
    if node.op_type == "Mul" and factor is not None and right is not None:
        return right, factor
    return None


def trace_cache(value: ir.Value, what: str) -> CachedHeads:
    """Walk from K or V, as attention reads it, up to where new rows are appended to a cache.

    1. Data movement, repetition of KV heads and multiplication by constants are passed.
    2. The first Concat joins a rank-4 graph input with the new rows, along the tokens (axis 2).
    3. Instead of a Concat, new rows may be written into a graph input of fixed size: TensorScatter along the
       tokens, or ScatterND between two Transposes that bring the tokens to the front and back.
    4. A graph input reached by nothing but movement is a cache that is not appended to: refused.

    Raises:
        NoMatch: any other node stands in the way.
    """
    scale = 1.0
    while True:
        value, factor = strip_scale(value)
        scale *= factor
        node = value.producer()
        if node is None:
            raise NoMatch(
                None, f"{what} comes straight from {value.name!r}; no cache is appended to", Reached.OPERANDS
            )
        if node.op_type == "Concat" and node.domain == "":
            return _append(node, value, what, scale)
        if node.op_type == "TensorScatter" and node.domain == "":
            return _written(node, value, what, scale)
        if _is_scatter(node):
            return _scattered(node, value, what, scale)
        if node.op_type in OPERATORS:
            raise quantised(node, what, Reached.OPERANDS)
        if node.op_type not in _MOVES or node.domain != "" or node.inputs[0] is None:
            raise NoMatch(node, f"{what} is not a concatenation of past and new rows", Reached.OPERANDS)
        value = node.inputs[0]


def _append(node: ir.Node, present: ir.Value, what: str, scale: float) -> CachedHeads:
    if len(node.inputs) != 2:
        raise NoMatch(
            node,
            f"{what} is joined from {len(node.inputs)} parts instead of past and new rows",
            Reached.CACHE,
        )
    past, new = node.inputs
    assert past is not None
    assert new is not None
    if not past.is_graph_input():
        raise NoMatch(node, f"the first part of {what} is no graph input, so it is no cache", Reached.CACHE)
    if isinstance(size := static_dim(past, 2), int):
        raise NoMatch(
            node, f"the cache of {what} has {size} rows in every call", Reached.CACHE, advice=DYNAMIC
        )
    if rank(past) not in (None, 4):
        raise NoMatch(
            node, f"the cache of {what} has rank {rank(past)} instead of 4 [B, G, P, D]", Reached.CACHE
        )
    axis = node.attributes["axis"].as_int()
    if axis not in (2, -2):
        raise NoMatch(
            node, f"the cache of {what} grows along axis {axis} instead of 2 (the tokens)", Reached.CACHE
        )
    return CachedHeads(past, new, present, scale)


def _written(node: ir.Node, present: ir.Value, what: str, scale: float) -> CachedHeads:
    past, new = node.inputs[:2]
    if past is None or new is None or not past.is_graph_input():
        raise NoMatch(
            node, f"{what} is written into something that is no graph input, so it is no cache", Reached.CACHE
        )
    axis, mode = node.attributes.get("axis"), node.attributes.get("mode")
    if axis is not None and axis.as_int() not in (2, -2):
        raise NoMatch(
            node, f"the cache of {what} is written along axis {axis.as_int()} instead of 2", Reached.CACHE
        )
    if mode is not None and mode.as_string() != "linear":
        raise NoMatch(
            node, f"the cache of {what} is a ring (mode {mode.as_string()}): a sliding window", Reached.CACHE
        )
    return CachedHeads(past, new, present, scale, fixed=True)


def _is_scatter(node: ir.Node) -> bool:
    """A Transpose that brings the tokens of a scattered cache [C,B,G,D] back to axis 2."""
    source = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
    return source is not None and source.op_type == "ScatterND" and source.domain == ""


def _scattered(node: ir.Node, present: ir.Value, what: str, scale: float) -> CachedHeads:
    assert node.inputs[0] is not None
    scatter = node.inputs[0].producer()
    assert scatter is not None
    moved, rows = (item.producer() if item is not None else None for item in scatter.inputs[0:3:2])
    past = moved.inputs[0] if moved is not None and moved.op_type == "Transpose" else None
    new = rows.inputs[0] if rows is not None and rows.op_type == "Transpose" else None
    if past is None or new is None or not past.is_graph_input():
        raise NoMatch(
            scatter,
            f"{what} is scattered into something that is no graph input moved to [C,B,G,D]",
            Reached.CACHE,
        )
    if list(node.attributes["perm"].as_ints()) != [1, 2, 0, 3]:
        raise NoMatch(node, f"the scattered cache of {what} is not moved back to [B,G,C,D]", Reached.CACHE)
    return CachedHeads(past, new, present, scale, fixed=True)
