"""Sizes of an attention site, from the shapes that the graph states."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.match.miss import NoMatch, Reached
from chai_export.graph.match.site import CachedHeads
from chai_export.graph.read.sizes import axis_size
from chai_export.op.heads import HeadCounts


def site_geometry(node: ir.Node, query: ir.Value, key: CachedHeads, value: CachedHeads) -> HeadCounts:
    """Sizes of a site whose query is [B, H, S, D].

    Raises:
        NoMatch: a size is symbolic everywhere, or the sizes do not fit each other.
    """
    heads = axis_size(query, 1)
    kv_heads = _first(axis_size(key.past, 1), axis_size(key.new, 1), axis_size(key.present, 1))
    dim = _first(axis_size(key.past, 3), axis_size(key.new, 3), axis_size(query, 3))
    value_heads = _first(axis_size(value.past, 1), axis_size(value.new, 1), axis_size(value.present, 1))
    value_dim = _first(axis_size(value.past, 3), axis_size(value.new, 3))
    sizes = {"query heads": heads, "KV heads": kv_heads, "head dim": dim, "value head dim": value_dim}
    unknown = [name for name, size in sizes.items() if size is None]
    if unknown:
        raise NoMatch(
            node,
            f"the graph does not state the {', '.join(unknown)}; export with static heads",
            Reached.RETURN,
        )
    assert heads is not None
    assert kv_heads is not None
    assert dim is not None
    assert value_dim is not None
    if heads % kv_heads or (value_heads is not None and value_heads != kv_heads):
        raise NoMatch(
            node, f"{heads} query heads, {kv_heads} key heads and {value_heads} value heads", Reached.RETURN
        )
    return HeadCounts(heads, kv_heads, dim, value_dim)


def _first(*sizes: int | None) -> int | None:
    return next((size for size in sizes if size is not None), None)
