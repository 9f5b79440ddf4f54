"""Optional outputs that an exporter left out by giving them an empty name.

Passes name every value, and then an operator with such outputs asks its runtime to compute them: TensorRT's
parser refuses ``SkipSimplifiedLayerNormalization`` with four outputs where it takes the same node with two.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

_OMITTED = "chai_export.omitted"


def remember_omitted_outputs(model: ir.Model) -> None:
    """Mark the outputs that have no name, so that :func:`restore_omitted_outputs` finds them."""
    for node in model.graph.all_nodes():
        omit_outputs([output for output in node.outputs if not output.name])


def omit_outputs(outputs: Iterable[ir.Value]) -> None:
    """Mark outputs without names of nodes that the rewrite makes."""
    for output in outputs:
        output.meta[_OMITTED] = True


def restore_omitted_outputs(model: ir.Model) -> None:
    """Take the names away again that passes have given to marked outputs."""
    for node in model.graph.all_nodes():
        for output in node.outputs:
            if output.meta.get(_OMITTED) and not output.uses() and not output.is_graph_output():
                output.name = ""
