"""The function bodies of the ops that a graph uses, put into its model."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.op import function
from chai_export.op.schema import DOMAIN
from chai_export.op.v2 import function as paged_function

_WITH_OVERLOADS = 10
"""The first IR version whose nodes name an overload of a function."""


def add_bodies(model: ir.Model) -> None:
    """Give every op node's body: that of version 2 whose form is the node's overload, or that of version 1.

    Bodies of ops that were there before go.
    """
    opset = model.opset_imports[""]
    for identifier in [each for each in model.functions if each[0] == DOMAIN]:
        del model.functions[identifier]
    forms = {form.overload: form for form in paged_function.plain_forms()}
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    for op_type, overload in sorted({(node.op_type, node.overload) for node in nodes}):
        if overload:
            body = paged_function.function_proto(opset, forms[overload], op_type)
            model.ir_version = max(model.ir_version, _WITH_OVERLOADS)
        else:
            body = function.function_proto(opset, op_type)
        made = ir.serde.deserialize_function(body)
        model.functions[made.identifier()] = made
