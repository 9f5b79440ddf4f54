"""The one form that matchers rely on, whoever exported a graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from chai_export.graph.read.interface_types import take_off_cache_casts, widen_integer_inputs
from chai_export.graph.read.shapes import infer_shapes

INLINE_BYTES = 1024
"""Initializers up to this size are kept in the ONNX file itself."""


def normalise(model: ir.Model) -> None:
    """Bring a model into the form that matchers rely on, without changing what it computes.

    1. Constants are initializers, of the main graph; initializers are no graph inputs.
    2. Integer inputs are int64; caches come and go in the type that attention computes with.
    3. Identity nodes are gone, and casts to the type that a value has already.
    4. A widening cast directly undone is gone (float16 → float32 → float16).
    5. Initializers of up to a kilobyte are in memory, larger ones stay where they are.
    6. Shapes are stated where the exporter left them out and ONNX can infer them.
    7. Nodes stand in topological order, unused ones are gone, every value has a unique name.
    """
    ir.passes.Sequential(
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.TopologicalSortPass(),
        common.IdentityEliminationPass(),
    )(model)
    widen_integer_inputs(model.graph)
    take_off_cache_casts(model.graph)
    _remove_idle_casts(model.graph)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= INLINE_BYTES:
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
    ir.passes.Sequential(common.RemoveUnusedNodesPass(), common.NameFixPass())(model)
    if any(output.shape is None for node in model.graph for output in node.outputs):
        infer_shapes(model)


_WIDER: dict[ir.DataType, set[ir.DataType]] = {
    ir.DataType.FLOAT16: {ir.DataType.FLOAT, ir.DataType.DOUBLE},
    ir.DataType.BFLOAT16: {ir.DataType.FLOAT, ir.DataType.DOUBLE},
    ir.DataType.FLOAT: {ir.DataType.DOUBLE},
    ir.DataType.INT32: {ir.DataType.INT64},
}


def _remove_idle_casts(graph: ir.Graph) -> None:
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
        if source is None or node.outputs[0].is_graph_output():
            continue
        target = ir.DataType(node.attributes["to"].as_int())
        before = source.producer()
        if source.dtype == target:
            replacement = source
        elif (
            before is not None
            and before.op_type == "Cast"
            and before.inputs[0] is not None
            and before.inputs[0].dtype == target
            and source.dtype in _WIDER.get(target, ())
        ):
            replacement = before.inputs[0]
        else:
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], replacement)
        graph.remove(node, safe=True)
