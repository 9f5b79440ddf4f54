"""Forms C and D: one ONNX ``Attention`` node (opset 23 and 24) over concatenated caches.

1. The node has 4-D query, key and value; no past inputs, no used extra outputs, no softcap, and its softmax
   is over plain scores.
2. Key and value go back to a Concat of a cache and new rows (:func:`~chai_export.graph.walk.trace_cache`),
   with or without repeated KV heads in between.
3. The factor on the scores is the ``scale`` attribute (1/√D without one) times factors on Q and K.
4. The mask input is left to the mask proof, together with ``is_causal``.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from chai_export.graph.constants import rank
from chai_export.graph.geometry import site_geometry
from chai_export.graph.site import AttentionSite, NoMatch, ScoreChain
from chai_export.graph.walk import strip_scale, trace_cache


def is_anchor(node: ir.Node) -> bool:
    """Whether ``node`` is an ``Attention`` of the default domain."""
    return node.op_type == "Attention" and node.domain == ""


def match(node: ir.Node, opset: int) -> AttentionSite:
    """Match one ``Attention`` node.

    Raises:
        NoMatch: with the node and the reason.
    """
    inputs = list(node.inputs) + [None] * (7 - len(node.inputs))
    query, key, value, mask, past_key, past_value, valid = inputs
    if query is None or key is None or value is None:
        raise NoMatch(node, "query, key or value is missing")
    if past_key is not None or past_value is not None:
        raise NoMatch(node, "the cache goes through the node's own past inputs, a form not supported yet", 1)
    if valid is not None:
        raise NoMatch(node, "nonpad_kv_seqlen is used, a form not supported yet", 1)
    if rank(query) != 4:
        raise NoMatch(node, f"the query has rank {rank(query)} instead of 4 [B, H, S, D]", 1)
    _plain(node)
    keys = trace_cache(key, "the key")
    values = trace_cache(value, "the value")
    if not math.isclose(values.scale, 1.0):
        raise NoMatch(node, f"the value is multiplied by {values.scale:g} after the cache", 3)
    source, query_scale = strip_scale(query)
    geometry = site_geometry(node, source, keys, values)
    given = node.attributes.get("scale")
    own = given.as_float() if given is not None else 1.0 / math.sqrt(geometry.head_dim)
    causal = node.attributes.get("is_causal")
    return AttentionSite(
        form="C" if opset < 24 else "D",
        anchor=node,
        query=source,
        key=keys,
        value=values,
        output=node.outputs[0],
        chain=ScoreChain(mask=mask, causal=causal is not None and causal.as_int() == 1),
        scale=own * query_scale * keys.scale,
        num_query_heads=geometry.query_heads,
        num_kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        value_head_dim=geometry.value_head_dim,
    )


def _plain(node: ir.Node) -> None:
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float() != 0.0:
        raise NoMatch(node, f"the scores are soft-capped at {softcap.as_float():g}", 1)
    used = [output.name for output in node.outputs[1:] if output.uses() or output.is_graph_output()]
    if used:
        raise NoMatch(node, f"its outputs {', '.join(map(str, used))} are used, a form not supported yet", 1)
