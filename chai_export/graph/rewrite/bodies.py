"""The function bodies of the ops that a graph uses, put into its model."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.op.function import form_named, function_proto
from chai_export.op.schema import DOMAIN

_WITH_OVERLOADS = 10
"""The first IR version whose nodes name an overload of a function."""


def add_bodies(model: ir.Model) -> None:
    """Give every op node's body: the one whose form is the node's overload.

    Bodies of ops that were there before go.
    """
    opset = model.opset_imports[""]
    model.ir_version = max(model.ir_version, _WITH_OVERLOADS)
    for identifier in [each for each in model.functions if each[0] == DOMAIN]:
        del model.functions[identifier]
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    for op_type, overload in sorted({(node.op_type, node.overload) for node in nodes}):
        made = ir.serde.deserialize_function(function_proto(opset, form_named(overload), op_type))
        model.functions[made.identifier()] = made
