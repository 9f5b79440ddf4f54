"""Attention operators that are refused by name: form J, and what quantisers and optimisers write."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.match.miss import NoMatch
from chai_export.graph.match.site import AttentionSite
from chai_export.graph.read.unfuse import MICROSOFT

_REFUSED = {
    "PagedAttention": "the cache is paged (PagedAttention)",
    "SparseAttention": "attention is block-sparse (SparseAttention)",
    "LinearAttention": "attention is linear (LinearAttention), there is no KV cache",
    "Attention": "the fused Attention operator keeps keys and values in one cache",
    "DecoderMaskedMultiHeadAttention": "DecoderMaskedMultiHeadAttention is not supported",
    "DecoderMaskedSelfAttention": "DecoderMaskedSelfAttention is not supported",
    "QAttention": "attention was quantised as a whole (QAttention)",
    "QLinearSoftmax": "the softmax is quantised (QLinearSoftmax)",
    "BiasSoftmax": "onnxruntime fused the mask into the softmax (BiasSoftmax)",
}
_UNFUSED = (
    "rewrite the file from before onnxruntime's optimiser, or let it stop earlier: "
    "SessionOptions.graph_optimization_level = ORT_ENABLE_BASIC, `optimum-cli onnxruntime optimize -O1`"
)
_WEIGHTS_ONLY = "quantise weights only: quantize_dynamic(IN, OUT, op_types_to_quantize=['MatMul'])"
_ADVICE = {
    "Attention": _UNFUSED,
    "DecoderMaskedMultiHeadAttention": _UNFUSED,
    "DecoderMaskedSelfAttention": _UNFUSED,
    "BiasSoftmax": _UNFUSED,
    "QAttention": _WEIGHTS_ONLY,
    "QLinearSoftmax": _WEIGHTS_ONLY,
}


def is_anchor(node: ir.Node) -> bool:
    """Whether ``node`` is one of these."""
    return node.domain == MICROSOFT and node.op_type in _REFUSED


def match(node: ir.Node, opset: int) -> AttentionSite:
    """Refuse one node.

    Raises:
        NoMatch: always, with the reason and what helps.
    """
    del opset
    raise NoMatch(node, _REFUSED[node.op_type], advice=_ADVICE.get(node.op_type))
