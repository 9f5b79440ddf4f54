"""Sizes of an attention site, from the shapes that the graph states."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from chai_export.graph.constants import integers, static_dim
from chai_export.graph.site import CachedHeads, NoMatch


@dataclass(frozen=True)
class HeadSizes:
    """H, G, D and Dv of one attention."""

    query_heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int


def site_geometry(node: ir.Node, query: ir.Value, key: CachedHeads, value: CachedHeads) -> HeadSizes:
    """Sizes of a site whose query is [B, H, S, D].

    Raises:
        NoMatch: a size is symbolic everywhere, or the sizes do not fit each other.
    """
    heads = _size(query, 1)
    kv_heads = _first(_size(key.past, 1), _size(key.new, 1), _size(key.present, 1))
    dim = _first(_size(key.past, 3), _size(key.new, 3), _size(query, 3))
    value_heads = _first(_size(value.past, 1), _size(value.new, 1), _size(value.present, 1))
    value_dim = _first(_size(value.past, 3), _size(value.new, 3))
    sizes = {"query heads": heads, "KV heads": kv_heads, "head dim": dim, "value head dim": value_dim}
    unknown = [name for name, size in sizes.items() if size is None]
    if unknown:
        raise NoMatch(node, f"the graph does not state the {', '.join(unknown)}; export with static heads", 4)
    assert heads is not None
    assert kv_heads is not None
    assert dim is not None
    assert value_dim is not None
    if heads % kv_heads or (value_heads is not None and value_heads != kv_heads):
        raise NoMatch(node, f"{heads} query heads, {kv_heads} key heads and {value_heads} value heads", 4)
    return HeadSizes(heads, kv_heads, dim, value_dim)


def _first(*sizes: int | None) -> int | None:
    return next((size for size in sizes if size is not None), None)


def _size(value: ir.Value, axis: int) -> int | None:
    """A dim stated by the value's shape, or by the Reshape and Transpose that made it."""
    size = static_dim(value, axis)
    if size is not None:
        return size
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Transpose" and "perm" in node.attributes and node.inputs[0] is not None:
        return _size(node.inputs[0], node.attributes["perm"].as_ints()[axis])
    if node.op_type == "Reshape":
        return _target_dim(node.inputs[1], axis)
    return None


def _target_dim(shape: ir.Value | None, axis: int) -> int | None:
    """One number of a Reshape target: a constant, or a part of a Concat of one-element parts."""
    numbers = integers(shape)
    if numbers is not None:
        return numbers[axis] if axis < len(numbers) and numbers[axis] > 0 else None
    node = shape.producer() if shape is not None else None
    if node is None or node.op_type != "Concat" or axis >= len(node.inputs):
        return None
    part = integers(node.inputs[axis])
    return part[0] if part is not None and len(part) == 1 and part[0] > 0 else None
