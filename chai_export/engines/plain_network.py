"""A bundle's graph in ONNX's own operators alone, with caches that have no pages.

An engine builder without plugins, such as TensorRT-RTX's, is to read it; any ONNX runtime can run it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.inliner

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.graph_io import BATCH, PAGE_TABLE
from chai_export.bundle.manifest import Manifest
from chai_export.errors import ChaiError
from chai_export.op.attributes import Attributes
from chai_export.op.contiguous import contiguous_inputs, contiguous_outputs, contiguous_proto
from chai_export.op.function import Form
from chai_export.op.schema import DOMAIN, signature

CAPACITY = "capacity"
"""The size C of every cache: positions of a row."""


def plain_network(bundle: Bundle, kept: Sequence[int] | None = None) -> onnx.ModelProto:
    """The bundle's graph with its op nodes in plain ONNX.

    Inputs and outputs are the bundle's, but that there are no page tables, and that K caches are
    [batch, R, capacity, D] and V caches [batch, G, capacity, Dv], where row b of the batch has place b. R is
    a number. Weights stay where they are: the result must be saved in the bundle's directory.

    Args:
        bundle: whose graph.
        kept: KV heads in the K cache of each layer; None: those of the bundle.

    Raises:
        ChaiError: caches are stored in another type than the model's.
    """
    manifest = bundle.manifest
    _require_own_dtype(manifest)
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    del model.functions[:]
    functions: dict[tuple[str, str], onnx.FunctionProto] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            form = _rewire(node)
            functions[node.op_type, form.overload] = contiguous_proto(opset, form, node.op_type)
    model.functions.extend(functions.values())
    _set_caches(model.graph, manifest, manifest.kept_heads if kept is None else kept)
    del model.graph.value_info[:]  # of the pools
    return onnx.inliner.inline_local_functions(model)


def _require_own_dtype(manifest: Manifest) -> None:
    bits = {*manifest.key_bits, *manifest.value_bits} - {0}
    if bits:
        raise ChaiError(
            f"the bundle stores caches in {min(bits)} bits, and its plain ONNX form has them in the model's "
            "dtype only; export with --key-bits 0 --value-bits 0"
        )


def _rewire(node: onnx.NodeProto) -> Form:
    """Leave a node, in place, the inputs and outputs that caches without pages have."""
    of = signature(node.op_type)
    given = {name: value for name, value in zip(of.input_names, node.input, strict=False) if value}
    made = {name: value for name, value in zip(of.output_names, node.output, strict=False) if value}
    known = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = Attributes(**{name: known[name] for name in Attributes().as_onnx() if name in known})
    form = Form.of(attributes, sinks="sinks" in given, slopes="alibi_slopes" in given)
    node.input[:] = [given[name] for name in contiguous_inputs(node.op_type, form)]
    node.output[:] = [made[name] for name in contiguous_outputs(node.op_type, form)]
    node.overload = form.overload
    return form


def _set_caches(graph: onnx.GraphProto, manifest: Manifest, kept: Sequence[int]) -> None:
    """Take page tables from a graph's inputs and give its caches their sizes."""
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name.split(".")[0] == PAGE_TABLE:
            del graph.input[index]
    sizes: dict[str, tuple[int | str, ...]] = {}
    for cache in manifest.io.caches:
        past = cache.past
        heads = past.dims[1] if isinstance(past.dims[1], int) else kept[cache.layer]
        shape = (BATCH, heads, CAPACITY, past.dims[3])
        sizes[past.name] = sizes[cache.present.name] = shape
    for value in (*graph.input, *graph.output):
        if value.name in sizes:
            element = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, element, sizes[value.name]))
