"""A head that multiplies by the embedding reads the embedding itself, so that the file holds it once."""

from __future__ import annotations

import onnx_ir as ir

from chai_export.graph.read.builder import Builder


def read_tied_weights(builder: Builder) -> None:
    """Put Gemm in the place of a MatMul with the Transpose of a float32 matrix that others read as it is.

    ONNX Runtime folds such a Transpose when it opens a model, which takes longer than packing the matrix from
    the layout that it has; Gemm says that layout, and takes two dimensions. 16-bit products are left alone:
    ONNX Runtime has no such Gemm everywhere.
    """
    graph = builder.graph
    for node in list(graph):
        weight = _tied(node)
        if weight is None or weight.shape is None:
            continue
        rows, width = (int(dim) for dim in weight.shape if isinstance(dim, int))
        values, old = node.inputs[0], node.outputs[0]
        flat = builder.op("Reshape", values, builder.integers(-1, width))
        product = builder.op("Gemm", flat, weight, transB=1)
        leading = builder.op("Shape", values, start=0, end=-1)
        result = builder.op("Reshape", product, builder.op("Concat", leading, builder.integers(rows), axis=0))
        for value in (flat, product, result):
            value.type = old.type
        result.shape = old.shape
        if old.is_graph_output():
            result.name, old.name = old.name, f"{old.name}/multiplied"
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _tied(node: ir.Node) -> ir.Value | None:
    """The matrix [out, in] behind the Transpose that a MatMul reads, if something else reads it too."""
    if node.op_type != "MatMul" or node.domain != "" or node.inputs[1] is None:
        return None
    turn = node.inputs[1].producer()
    if turn is None or turn.op_type != "Transpose" or len(turn.outputs[0].uses()) != 1:
        return None
    weight = turn.inputs[0]
    if weight is None or not weight.is_initializer() or weight.dtype != ir.DataType.FLOAT:
        return None
    two = weight.shape is not None and len(weight.shape) == 2
    return weight if two and len(weight.uses()) > 1 else None
