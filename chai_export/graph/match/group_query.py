"""Forms G and H: onnxruntime's ``GroupQueryAttention``, after :mod:`chai_export.graph.read.unfuse`.

1. No bias or extra output: refused by name. Quantised caches have become floats before
   (:mod:`chai_export.graph.read.quantised_caches`).
2. ``local_window_size`` and ``softcap`` are the op's window and soft cap, ``head_sink`` its sinks; a smooth
   softmax has a sink of 0 for each head.
3. Query, key and value have been split into heads in front of the node, RoPE stands before it; both caches
   are graph inputs, the presents the node's own outputs.
4. The operator is causal by definition. Which keys are padding it reads off ``seqlens_k``, and that this is
   right is left to the numerical proof, which feeds an attention mask.

Form G has fused RoPE in the file, form H separate nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from chai_export.graph.match.form import Form
from chai_export.graph.match.geometry import site_geometry
from chai_export.graph.match.miss import NoMatch, Reached
from chai_export.graph.match.site import AttentionSite, CachedHeads, RightPadding, ScoreChain, ScoreTerms
from chai_export.graph.read.unfuse import MICROSOFT, by_head, output_by_head

_BIAS, _SINKS = 10, 11
_NORMS = (14, 15)


def is_anchor(node: ir.Node) -> bool:
    """Whether ``node`` is a ``GroupQueryAttention``."""
    return node.domain == MICROSOFT and node.op_type == "GroupQueryAttention"


def match(node: ir.Node, opset: int) -> AttentionSite:
    """Match one node.

    Raises:
        NoMatch: with the node and the reason.
    """
    del opset
    _plain(node)
    query, key, value = (by_head(item) for item in node.inputs[:3])
    output = output_by_head(node)
    if query is None or key is None or value is None or output is None:
        raise NoMatch(node, "the graph does not state the width of query, key and value", Reached.SCORES)
    past_key, past_value = node.inputs[3:5]
    caches = []
    for what, past, new, present in (
        ("key", past_key, key, node.outputs[1]),
        ("value", past_value, value, node.outputs[2]),
    ):
        if past is None or not past.is_graph_input():
            raise NoMatch(node, f"the past {what} is no graph input, so there is no cache", Reached.OPERANDS)
        caches.append(CachedHeads(past, new, present))
    heads = site_geometry(node, query, *caches)
    given = node.attributes.get("scale")
    scale = given.as_float() if given is not None else 0.0
    rotated = query.producer()
    fused = rotated is not None and rotated.op_type == "RotaryEmbedding"
    return AttentionSite(
        form=Form.G if fused else Form.H,
        anchor=node,
        query=query,
        key=caches[0],
        value=caches[1],
        output=output,
        chain=ScoreChain(causal=True, sinks=_input(node, _SINKS)),
        scale=scale or 1.0 / math.sqrt(heads.head_dim),
        heads=heads,
        terms=_terms(node, heads.num_query_heads),
        right_padding=RightPadding.FRESH,
    )


def _terms(node: ir.Node, heads: int) -> ScoreTerms:
    """Rule 2, but for sinks that are an input."""
    smooth = node.attributes.get("smooth_softmax")
    window, softcap = node.attributes.get("local_window_size"), node.attributes.get("softcap")
    return ScoreTerms(
        window=max(0, window.as_int()) if window is not None else 0,
        softcap=softcap.as_float() if softcap is not None else 0.0,
        sinks=(0.0,) * heads if smooth is not None and smooth.as_int() == 1 else None,
    )


def _plain(node: ir.Node) -> None:
    """Rule 1; all reasons are given at once."""
    reasons = list(_reasons(node))
    if reasons:
        raise NoMatch(node, "; ".join(reasons))


def _reasons(node: ir.Node) -> Iterator[str]:
    if _input(node, _BIAS) is not None:
        yield "a bias is added to the scores (attention_bias)"
    if any(_input(node, index) is not None for index in _NORMS):
        yield "query and key norms inside the operator could not be taken out"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        yield "its scores are used as an output"


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
