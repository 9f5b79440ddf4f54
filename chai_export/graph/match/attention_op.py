"""Forms C, D, E and K: one ONNX ``Attention`` node (opset 23 and 24).

1. The node has query, key and value in four dims, or in three that
   :mod:`chai_export.graph.read.unfuse` has split into heads; no used extra outputs. Its
   ``softcap`` is the op's.
2. Key and value go back to a cache (:mod:`~chai_export.graph.match.trace_cache`): a Concat with new rows (C,
   D), a ScatterND (E) or TensorScatter (K) into a cache of fixed size, with or without repeated KV heads.
3. Or the node has past inputs and gives the presents itself (K).
4. The factor on the scores is the ``scale`` attribute (1/√D without one) times factors on Q and K.
5. The mask input is left to the mask proof, together with ``is_causal``; ``nonpad_kv_seqlen`` to the
   numerical proof, which feeds it.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from chai_export.graph.match.form import Form
from chai_export.graph.match.geometry import site_geometry
from chai_export.graph.match.miss import NoMatch, Reached
from chai_export.graph.match.site import AttentionSite, CachedHeads, RightPadding, ScoreChain, ScoreTerms
from chai_export.graph.match.trace_cache import strip_scale, trace_cache
from chai_export.graph.read.constants import rank
from chai_export.graph.read.unfuse import by_head, has_merged_heads, output_by_head


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
    merged = has_merged_heads(node)
    query = by_head(query) if merged else query
    output = output_by_head(node) if merged else node.outputs[0]
    if query is None or output is None or rank(query) != 4:
        raise NoMatch(
            node, "the operands are neither [B, H, S, D] nor [B, S, H*D] of known sizes", Reached.SCORES
        )
    own_cache = past_key is not None and past_value is not None
    _no_other_outputs(node, own_cache)
    keys = _cached(node, key, past_key, 1, "the key") if own_cache else trace_cache(key, "the key")
    values = (
        _cached(node, value, past_value, 2, "the value") if own_cache else trace_cache(value, "the value")
    )
    if not math.isclose(values.scale, 1.0):
        raise NoMatch(node, f"the value is multiplied by {values.scale:g} after the cache", Reached.CACHE)
    source, query_scale = strip_scale(query)
    heads = site_geometry(node, source, keys, values)
    given = node.attributes.get("scale")
    own = given.as_float() if given is not None else 1.0 / math.sqrt(heads.head_dim)
    causal = node.attributes.get("is_causal")
    softcap = node.attributes.get("softcap")
    return AttentionSite(
        form=_form(keys, own_cache, opset),
        anchor=node,
        query=source,
        key=keys,
        value=values,
        output=output,
        chain=ScoreChain(mask=mask, causal=causal is not None and causal.as_int() == 1),
        scale=own * query_scale * keys.scale,
        heads=heads,
        terms=ScoreTerms(softcap=softcap.as_float() if softcap is not None else 0.0),
        right_padding=RightPadding.ANYWHERE if valid is None else RightPadding.NOWHERE,
    )


def _cached(node: ir.Node, operand: ir.Value, past: ir.Value | None, index: int, what: str) -> CachedHeads:
    """Rule 3: the node appends to the cache itself."""
    new = by_head(operand) if has_merged_heads(node) else operand
    if new is None or past is None or not past.is_graph_input() or index >= len(node.outputs):
        raise NoMatch(
            node, f"the cache of {what} is no graph input, or nothing gives its present", Reached.OPERANDS
        )
    return CachedHeads(past, new, node.outputs[index])


def _form(keys: CachedHeads, own_cache: bool, opset: int) -> Form:
    if own_cache:
        return Form.K
    if keys.fixed:
        writer = keys.present.producer()
        return Form.K if writer is not None and writer.op_type == "TensorScatter" else Form.E
    return Form.C if opset < 24 else Form.D


def _no_other_outputs(node: ir.Node, own_cache: bool) -> None:
    used = [
        output.name
        for output in node.outputs[3 if own_cache else 1 :]
        if output.uses() or output.is_graph_output()
    ]
    if used:
        raise NoMatch(
            node,
            f"its outputs {', '.join(map(str, used))} are used, a form not supported yet",
            Reached.SCORES,
        )
