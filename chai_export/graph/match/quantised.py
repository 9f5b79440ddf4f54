"""Attention of which the products themselves are quantised: refused, with what leaves them out.

Quantised weights in front of attention and behind it do no harm. Quantised scores, probabilities, keys or
values do: the op computes with them as they are, so a rewrite would be another model.
"""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.match.miss import NoMatch, Reached

OPERATORS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearMatMul", "MatMulInteger"}
)
"""Between softmax and products only quantised attention has these."""


def quantised(node: ir.Node, what: str, reached: Reached) -> NoMatch:
    """The refusal of an attention of which ``what`` is quantised by ``node``."""
    return NoMatch(
        node,
        f"attention itself is quantised ({what})",
        reached,
        advice=(
            "quantise its weights only: quantize_dynamic(IN, OUT, op_types_to_quantize=['MatMul']), or "
            "quantize_static(…, nodes_to_exclude=NAMES) with the names of the two MatMuls of each attention"
        ),
    )
