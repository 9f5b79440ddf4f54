"""Form I: onnxruntime's ``MultiHeadAttention``, after :mod:`chai_export.graph.read.unfuse`.

1. Query, key and value are [B,S,H·D]; no packed weights, projection bias or key padding mask.
2. Either the node has past inputs and gives the presents itself, or key and value go back to a Concat of a
   cache and new rows (:mod:`~chai_export.graph.match.trace_cache`), with KV heads repeated in between.
3. The ``attention_bias`` input is left to the mask proof, together with ``unidirectional``.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from chai_export.graph.match.form import Form
from chai_export.graph.match.geometry import site_geometry
from chai_export.graph.match.miss import NoMatch, Reached
from chai_export.graph.match.site import AttentionSite, CachedHeads, ScoreChain
from chai_export.graph.match.trace_cache import trace_cache
from chai_export.graph.read.unfuse import MICROSOFT, by_head, output_by_head

_UNKNOWN = {
    3: "it adds a bias to query, key and value",
    4: "it has a key padding mask",
    8: "it has a past sequence length",
    9: "it has a cache indirection (beam search)",
}


def is_anchor(node: ir.Node) -> bool:
    """Whether ``node`` is a ``MultiHeadAttention``."""
    return node.domain == MICROSOFT and node.op_type == "MultiHeadAttention"


def match(node: ir.Node, opset: int) -> AttentionSite:
    """Match one node.

    Raises:
        NoMatch: with the node and the reason.
    """
    del opset
    inputs = list(node.inputs) + [None] * (10 - len(node.inputs))
    for index, reason in _UNKNOWN.items():
        if inputs[index] is not None:
            raise NoMatch(node, f"{reason}, a form not supported yet")
    if inputs[1] is None or inputs[2] is None:
        raise NoMatch(node, "query, key and value are packed into one operand, a form not supported yet")
    query, output = by_head(inputs[0]), output_by_head(node)
    if query is None or output is None:
        raise NoMatch(node, "the graph does not state the width of the query", Reached.SCORES)
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        raise NoMatch(node, "its scores are used as an output", Reached.SCORES)
    key = _cached(node, inputs[1], inputs[6], 1, "the key")
    value = _cached(node, inputs[2], inputs[7], 2, "the value")
    if not math.isclose(value.scale, 1.0):
        raise NoMatch(node, f"the value is multiplied by {value.scale:g} after the cache", Reached.CACHE)
    heads = site_geometry(node, query, key, value)
    given = node.attributes.get("scale")
    scale = given.as_float() if given is not None else 0.0
    causal = node.attributes.get("unidirectional")
    return AttentionSite(
        form=Form.I,
        anchor=node,
        query=query,
        key=key,
        value=value,
        output=output,
        chain=ScoreChain(mask=inputs[5], causal=causal is not None and causal.as_int() == 1),
        scale=(scale or 1.0 / math.sqrt(heads.head_dim)) * key.scale,
        heads=heads,
    )


def _cached(node: ir.Node, operand: ir.Value, past: ir.Value | None, index: int, what: str) -> CachedHeads:
    if past is None:
        return trace_cache(operand, what)
    new = by_head(operand)
    if new is None or not past.is_graph_input():
        raise NoMatch(node, f"the cache of {what} is no graph input of a known size", Reached.OPERANDS)
    return CachedHeads(past, new, node.outputs[index])
