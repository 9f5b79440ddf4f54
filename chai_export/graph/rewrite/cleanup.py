"""Remove what the rewrite left without a purpose, and check that nothing of the old interface is left."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from chai_export.bundle.graph_io import GraphIO
from chai_export.errors import ChaiError
from chai_export.graph.match.site import AttentionSite
from chai_export.graph.read.builder import Builder
from chai_export.graph.read.constants import integers
from chai_export.graph.read.shapes import infer_shapes
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.schema import register_schema_once


def drop_dead_nodes(model: ir.Model) -> None:
    """Remove nodes and initializers that no output needs: mask arithmetic, cache joins, repeated heads."""
    common.RemoveUnusedNodesPass()(model)


def replace_cache_shapes(builder: Builder, sites: list[AttentionSite], input_ids: ir.Value) -> None:
    """Take batch size and head sizes from elsewhere where the graph read them off the old caches.

    Exporters use ``Shape(past)`` for the batch size. The number of past tokens differs by row now and has no
    such value; whoever still asks for it keeps the old cache alive and is refused later.
    """
    for site in sites:
        for cache, dim in ((site.key, site.heads.head_dim), (site.value, site.heads.value_head_dim)):
            known = {1: site.heads.num_kv_heads, 3: dim}
            for value in (cache.past, cache.present):
                for node in list(value.consumers()):
                    if node.op_type == "Shape" and node.domain == "":
                        _replace_shape(builder, node, known, input_ids)


def replace_position_shapes(builder: Builder, cache_position: ir.Value | None, input_ids: ir.Value) -> None:
    """Take the number of new tokens from the token ids where the graph read it off ``cache_position`` [S]."""
    for node in list(cache_position.consumers()) if cache_position is not None else ():
        if node.op_type == "Shape" and node.domain == "":
            tokens = builder.op("Shape", input_ids, start=1, end=2)
            ir.convenience.replace_all_uses_with(node.outputs[0], tokens)


def _replace_shape(builder: Builder, node: ir.Node, known: dict[int, int], input_ids: ir.Value) -> None:
    start, end = node.attributes.get("start"), node.attributes.get("end")
    axes = range(4)[start.as_int() if start is not None else 0 : end.as_int() if end is not None else None]
    whole = node.outputs[0]
    if 2 not in axes:
        ir.convenience.replace_all_uses_with(whole, _sizes(builder, list(axes), known, input_ids))
        return
    for reader in list(whole.consumers()):
        index = integers(reader.inputs[1]) if reader.op_type == "Gather" else None
        if index is None or len(index) != 1 or axes[index[0]] == 2:
            continue
        size = _sizes(builder, [axes[index[0]]], known, input_ids)
        indexed = reader.inputs[1]
        if indexed is not None and indexed.shape is not None and len(indexed.shape) == 0:
            size = builder.op("Squeeze", size, builder.integers(0))
        ir.convenience.replace_all_uses_with(reader.outputs[0], size)


def _sizes(builder: Builder, axes: list[int], known: dict[int, int], input_ids: ir.Value) -> ir.Value:
    parts = [
        builder.op("Shape", input_ids, start=0, end=1) if axis == 0 else builder.integers(known[axis])
        for axis in axes
    ]
    return parts[0] if len(parts) == 1 else builder.op("Concat", *parts, axis=0)


def require_no_uses(values: list[ir.Value]) -> None:
    """Every old input must be without readers.

    Raises:
        ChaiError: names the input and the node that still reads it.
    """
    for value in values:
        readers = value.consumers()
        if readers:
            node = readers[0]
            raise ChaiError(
                f"node {node.name!r} ({node.op_type}) uses {value.name} for something that is neither "
                "attention nor position ids; export the model with position_ids as an input, or choose "
                "another model"
            )


def tidy(model: ir.Model) -> None:
    """Merge equal expressions, sort, name everything once and drop opsets that nothing uses."""
    model.graph.sort()
    ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.NameFixPass(),
    )(model)


_ONNXRUNTIME = "com.microsoft"
_ONNXRUNTIME_ONLY = frozenset({"SimplifiedLayerNormalization"})
"""Operators that onnxruntime registers in the default domain although ONNX has none of that name."""


def state_shapes(model: ir.Model, *, forget: bool) -> None:
    """Give every value its type, and its shape where ONNX can infer it; ``forget`` drops known ones first."""
    if forget:
        kept = set(model.graph.outputs)
        for node in model.graph:
            for output in node.outputs:
                output.shape = output.shape if output in kept else None
    register_schema_once()
    infer_shapes(model)


def check_result(model: ir.Model, io: GraphIO) -> None:
    """The graph has the inputs and outputs of ``io`` and is well formed.

    Raises:
        ChaiError: an initializer or value is missing, or the model checker finds a fault: an error of the
            rewrite or of the source graph.
    """
    difference = io.difference(
        {str(value.name): _described(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    )
    if difference is not None:
        raise ChaiError(f"the rewritten graph is not what it should be: {difference}; report this model")
    # The checker passes over operators of domains that it does not know.
    foreign = [node for node in model.graph if node.domain == "" and node.op_type in _ONNXRUNTIME_ONLY]
    for node in foreign:
        node.domain = _ONNXRUNTIME
        model.opset_imports.setdefault(_ONNXRUNTIME, 1)
    try:
        # Weights are left out for the check, so it takes no memory to speak of.
        common.CheckerPass()(model)
    except Exception as error:  # the checker and its pass raise types of their own
        cause = error.__cause__ or error
        raise ChaiError(
            f"the rewritten graph is not valid ONNX ({str(cause).strip().splitlines()[0][:200]}); "
            "export the model again with another opset"
        ) from error
    finally:
        for node in foreign:
            node.domain = ""


_ELEMENT_TYPES = {element.onnx: name for name, element in ELEMENT_TYPES.items()}


def _described(value: ir.Value) -> tuple[str, list[int | str | None]]:
    dtype = value.dtype or ir.DataType.UNDEFINED
    dims: list[int | str | None] = []
    for dim in value.shape or ():
        dims.append(dim if isinstance(dim, int) else None)
    return _ELEMENT_TYPES.get(dtype.value, dtype.name), dims
