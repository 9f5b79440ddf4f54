"""Quantise the products of a traced model: MatMul and Gemm with a weight become MatMulNBits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from chai_export.errors import ChaiError, UsageError
from chai_export.exporter.lazy_transpose import TRANSPOSED
from chai_export.graph.weights.block_weight import COLUMNS, DOMAIN, block_product
from chai_export.graph.weights.quantise import WeightFormat
from chai_export.op.dtypes import Dtype

ACCURACY_LEVEL = 4
"""int8 activations: the fastest on CPUs at 4 and at 8 bits (benchmarks/experiments.md)."""
_WRAPPER = "model."
"""What the traced module puts before the names of the model's parameters."""
_ROUTER = re.compile(r"(^|\.)(gate|router)(\.|$)")
"""Choices between experts: few numbers, and an error there moves a whole token."""
_HALVES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def check_weights(form: WeightFormat, dtype: Dtype, *, static: bool) -> None:
    """Refuse what cannot be combined with quantised weights, before a file is read.

    Raises:
        UsageError: names the option.
    """
    if dtype is Dtype.BFLOAT16:
        raise UsageError(
            f"--weights {form.name} with --dtype bfloat16 is no product of ONNX Runtime; "
            "give --dtype float32 or float16"
        )
    if static:
        raise UsageError(
            f"--weights {form.name} with --membership static cannot be verified, because the cut weights are "
            "those of no model; use --membership online"
        )


def quantise_products(model: ir.Model, form: WeightFormat, *, head: bool = True) -> int:
    """Put MatMulNBits in the place of products with a matrix of the model, one matrix at a time, in place.

    Each is named after its parameter, so that `verify` finds the number that it stands for. Left alone are
    routers of experts, experts that are stored as one tensor, and matrices narrower than a block.

    Args:
        model: a traced and optimised graph; float matrices that nothing reads any more leave it.
        form: what is quantised to.
        head: the product that makes the logits too, in 8 bits: 4 cost there as much as in half of all layers
            (benchmarks/weight_bits.py).

    Returns:
        How many products there are now.

    Raises:
        ChaiError: the graph has none that can be quantised.
    """
    graph = model.graph
    last = _head(graph)
    head_form = replace(form, bits=8)
    made = 0
    for node, weight, name in list(_products(graph)):
        if (node is last and not head) or _ROUTER.search(name) or _width(node, weight) < form.block:
            continue
        matrix = _matrix(node, weight)
        activations, result = node.inputs[0], node.outputs[0]
        assert activations is not None
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        product = block_product(
            graph,
            activations,
            (head_form if node is last else form).quantise(matrix),
            name,
            accuracy_level=ACCURACY_LEVEL,
        )
        del matrix
        new = product.outputs[0]
        new.shape, new.type = result.shape, result.type
        graph.insert_before(node, product)
        if bias is not None:
            added = ir.node("Add", [new, bias])
            graph.insert_before(node, added)
            new = added.outputs[0]
            new.shape, new.type = result.shape, result.type
        if result.is_graph_output():
            new.name, result.name = result.name, None
        ir.convenience.replace_all_uses_with(result, new, replace_graph_outputs=True)
        turn = None if node.inputs[1] is None else node.inputs[1].producer()
        graph.remove(node, safe=True)
        if turn is not None and not turn.outputs[0].uses():
            graph.remove(turn, safe=True)
        if not weight.uses():
            del graph.initializers[str(weight.name)]
        made += 1
    if not made:
        raise ChaiError(
            f"this model has no products with matrices of at least {form.block} columns, so there is nothing "
            f"to store as {form.name}; export it without --weights"
        )
    model.opset_imports[DOMAIN] = graph.opset_imports[DOMAIN] = 1
    return made


def _products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, str]]:
    """Products with a matrix of the model: the node, the weight, and its name in the model."""
    for node in graph:
        if node.domain != "" or node.op_type not in ("MatMul", "Gemm") or not _is_plain(node):
            continue
        weight = node.inputs[1]
        turn = None if weight is None else weight.producer()
        if turn is not None and turn.op_type == "Transpose":
            weight = turn.inputs[0]  # a tied embedding
        if weight is None or weight.const_value is None or weight.dtype not in _HALVES:
            continue
        if weight.shape is None or len(weight.shape) != 2:
            continue
        given = str(weight.name)
        name = given.removesuffix(TRANSPOSED).removeprefix(_WRAPPER)
        # A parameter that is multiplied as it is stored has its outputs in columns.
        stored_by_output = given.endswith(TRANSPOSED) or _is_transposed(node)
        yield node, weight, name if stored_by_output else f"{name}.{COLUMNS}"


def _is_plain(node: ir.Node) -> bool:
    if node.op_type == "MatMul":
        return True
    factors = [node.attributes.get(name) for name in ("alpha", "beta")]
    turned = node.attributes.get("transA")
    return all(f is None or f.as_float() == 1.0 for f in factors) and (turned is None or not turned.as_int())


def _is_transposed(node: ir.Node) -> bool:
    """Whether the weight is [out, in]."""
    if node.op_type == "MatMul":
        return node.inputs[1] is not None and node.inputs[1].producer() is not None
    turned = node.attributes.get("transB")
    return turned is not None and bool(turned.as_int())


def _width(node: ir.Node, weight: ir.Value) -> int:
    assert weight.const_value is not None
    return int(weight.const_value.shape.numpy()[1 if _is_transposed(node) else 0])


def _matrix(node: ir.Node, weight: ir.Value) -> NDArray[np.floating]:
    """[out, in]."""
    assert weight.const_value is not None
    array: NDArray[np.floating] = weight.const_value.numpy()
    return array if _is_transposed(node) else array.T


def _head(graph: ir.Graph) -> ir.Node | None:
    """The last product before the logits."""
    value = graph.outputs[0]
    while (node := value.producer()) is not None:
        if node.op_type in ("MatMul", "Gemm") or not node.inputs or node.inputs[0] is None:
            return node
        value = node.inputs[0]
    return None
