"""Rotary embeddings of float16 and bfloat16 models become one node each, as those of float32 models do.

transformers computes cosines and sines in float32 and rounds them to the model's dtype. onnxscript's fusion
knows the graph without the rounding only, so it is out of sight while the fusion runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_ROUNDED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_FACTORS = ("Cos", "Sin")


@contextmanager
def rotary_casts(model: ir.Model) -> Iterator[None]:
    """Leave out casts of cosines and sines to 16 bits inside the block; afterwards whoever reads one has it.

    A node RotaryEmbedding that the block made reads its factors in the dtype of what it turns.
    """
    graph = model.graph
    hidden: list[tuple[ir.Value, ir.DataType]] = []
    exact: set[ir.Node] = set()
    for cast in [node for node in graph if _is_rounding(node)]:
        factor = cast.inputs[0]
        assert factor is not None
        exact.update(reader for reader, _ in factor.uses())
        ir.convenience.replace_all_uses_with(cast.outputs[0], factor)
        hidden.append((factor, _target(cast)))
    try:
        yield
    finally:
        for factor, dtype in hidden:
            _round(factor, dtype, exact)
        for node in [node for node in graph if node.op_type == "RotaryEmbedding" and node.domain == ""]:
            turned, *factors = node.inputs[:3]
            for factor in factors:
                if turned is not None and factor is not None and turned.dtype in _ROUNDED:
                    _round(factor, turned.dtype, exact)
        RemoveUnusedNodesPass()(model)


def _is_rounding(node: ir.Node) -> bool:
    if node.op_type != "Cast" or node.outputs[0].is_graph_output() or _target(node) not in _ROUNDED:
        return False
    return node.inputs[0] is not None and _maker(node.inputs[0]) is not None


def _target(cast: ir.Node) -> ir.DataType:
    return ir.DataType(cast.attributes["to"].as_int())


def _maker(factor: ir.Value) -> ir.Node | None:
    """The node that makes a cosine or sine; None for another value."""
    maker = factor.producer()
    return maker if maker is not None and maker.op_type in _FACTORS else None


def _round(factor: ir.Value, dtype: ir.DataType, exact: set[ir.Node]) -> None:
    """Let who reads ``factor`` read it in ``dtype``, but for ``exact`` ones."""
    readers = [(node, index) for node, index in factor.uses() if node not in exact]
    maker = _maker(factor)
    if not readers or maker is None or maker.graph is None:
        return
    cast = ir.node("Cast", [factor], {"to": dtype})
    cast.outputs[0].name = f"{factor.name}.rounded"
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, factor.shape
    maker.graph.insert_after(maker, cast)
    exact.add(cast)
    for node, index in readers:
        node.replace_input_with(index, cast.outputs[0])
