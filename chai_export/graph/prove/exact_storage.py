"""Take the storage of caches out of a graph, for comparisons: every row is kept as it is computed.

A source keeps its keys and values as they are, a bundle may keep them in 16, 8 or 4 bits. With exact storage
the same graph gives the source's logits; what is written and run is not touched.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from chai_export.bundle.graph_io import GraphIO
from chai_export.bundle.manifest import Manifest
from chai_export.graph.rewrite.bodies import add_bodies
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.function import form_named
from chai_export.op.schema import DOMAIN, signature

_SCALES = ("key_scales", "value_scales")


def exact_storage(model: ir.Model, manifest: Manifest) -> None:
    """Let the op nodes of a bundle's graph keep rows in the model's dtype, in place.

    The caches change their type and width, their scales go, and the bodies are those of exact storage.
    """
    exact = manifest.model_copy(
        update={name: [0] * manifest.num_layers for name in ("key_bits", "value_bits")}
    ).io
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        of = signature(node.op_type)
        for name in _SCALES:
            node.replace_input_with(of.input_names.index(name), None)
        for name in ("key_bits", "value_bits"):
            node.attributes[name] = ir.AttrInt64(name, 0)
        node.overload = replace(form_named(node.overload), key_bits=0, value_bits=0).overload
    _drop_scales(model.graph, exact)
    _retype(model.graph, exact)
    add_bodies(model)


def _drop_scales(graph: ir.Graph, exact: GraphIO) -> None:
    inputs, outputs = ({value.name for value in values} for values in (exact.inputs, exact.outputs))
    for values, kept in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value in [value for value in values if value.name not in kept]:
            values.remove(value)
            value.name, value.type, value.shape = "", None, None


def _retype(graph: ir.Graph, exact: GraphIO) -> None:
    named = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for cache in exact.caches:
        for wanted in (cache.past, cache.present):
            value = named[wanted.name]
            value.type = ir.TensorType(ir.DataType(ELEMENT_TYPES[wanted.dtype].onnx))
            value.shape = ir.Shape(list(wanted.dims))
