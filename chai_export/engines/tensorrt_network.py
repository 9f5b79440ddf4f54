"""The ONNX graph that TensorRT's parser reads: the op's nodes as a plugin's, with nothing absent."""

from __future__ import annotations

import onnx

from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError
from chai_export.kernels.spec import Spec
from chai_export.op.attributes import Attributes
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.function import Form
from chai_export.op.schema import DOMAIN, OP_TYPE, signature
from chai_export.runtime.tensorrt_environment import HELD_AS

PLUGIN_VERSION_ATTRIBUTE = "plugin_version"
PLUGIN_NAMESPACE_ATTRIBUTE = "plugin_namespace"
KERNEL_DIRECTORY_ATTRIBUTE = "kernel_directory"

_SINKS, _SLOPES = "sinks", "alibi_slopes"


def plugin_network(bundle: Bundle, version: str, namespace: str, kernels: str) -> onnx.ModelProto:
    """The bundle's graph without the function bodies, its op nodes marked for the plugin.

    Parsers differ in whether a function or a plugin of the same name goes first, so functions are removed. A
    layer of TensorRT has no absent inputs: those that a node has not are left out. Weights stay where they
    are: the result must be saved in the bundle's directory.

    Args:
        bundle: whose graph.
        version: of the plugin.
        namespace: of the plugin.
        kernels: directory with one directory of kernels for each form.

    Raises:
        ChaiError: there is not exactly one op node per layer.
    """
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    nodes = op_nodes(model, bundle)
    kept = [f for f in model.functions if (f.domain, f.name) != (DOMAIN, OP_TYPE)]
    del model.functions[:]
    model.functions.extend(kept)
    for node in nodes:
        marks = {
            PLUGIN_VERSION_ATTRIBUTE: version,
            PLUGIN_NAMESPACE_ATTRIBUTE: namespace,
            KERNEL_DIRECTORY_ATTRIBUTE: f"{kernels}/{form_of(node).overload}",
        }
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in marks.items())
        node.overload = ""
        node.input[:] = [name for name in node.input if name]
        node.output[:] = [name for name in node.output if name]
    _hold_bytes(model)
    return model


def specs(bundle: Bundle) -> dict[str, Spec]:
    """What the kernels of each form in a bundle are compiled for, by the form's name.

    Layers that store alike share them: the number of kept heads is a call's.

    Raises:
        ChaiError: there is not exactly one op node per layer.
    """
    m = bundle.manifest
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    found = {}
    for node in op_nodes(model, bundle):
        form = form_of(node)
        found[form.overload] = Spec(
            m.num_query_heads,
            m.num_kv_heads,
            m.head_dim,
            m.value_head_dim,
            m.dtype,
            m.probe_tokens,
            key_bits=form.key_bits,
            value_bits=form.value_bits,
            group_size=m.storage.group,
            softcap=form.softcap,
            sinks=form.sinks,
            slopes=form.slopes,
        )
    return found


def op_nodes(model: onnx.ModelProto, bundle: Bundle) -> list[onnx.NodeProto]:
    """The attentions of a bundle's graph.

    Raises:
        ChaiError: there is not exactly one per layer.
    """
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    if len(nodes) != bundle.manifest.num_layers:
        raise ChaiError(
            f"{bundle.model_path} has {len(nodes)} {OP_TYPE} nodes for {bundle.manifest.num_layers} layers; "
            "export or rewrite again"
        )
    return nodes


def form_of(node: onnx.NodeProto) -> Form:
    """How a node stores its caches, and what it adds to scores."""
    names = signature(OP_TYPE).input_names
    given = {name for name, value in zip(names, node.input, strict=False) if value}
    known = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = Attributes(**{name: known[name] for name in Attributes().as_onnx() if name in known})
    return Form.of(attributes, sinks=_SINKS in given, slopes=_SLOPES in given)


def relocated(model: onnx.ModelProto, old: str, kernels: str, weights: str) -> onnx.ModelProto:
    """A copy that takes what lay below directory ``old`` from other directories.

    Args:
        model: for the parser.
        old: the directory, as the model names it.
        kernels: in its place for the plugin, which knows no directory of the model: an absolute path.
        weights: in its place for external data: relative to the model.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name == KERNEL_DIRECTORY_ATTRIBUTE:
                attribute.s = _moved(attribute.s.decode(), old, kernels).encode()
    for tensor in copy.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = _moved(entry.value, old, weights)
    return copy


def _moved(place: str, old: str, new: str) -> str:
    return f"{new}{place[len(old) :]}" if place.startswith(f"{old}/") else place


def _hold_bytes(model: onnx.ModelProto) -> None:
    """Declare caches in bytes as TensorRT has them."""
    held = {ELEMENT_TYPES[name].onnx: ELEMENT_TYPES[other].onnx for name, other in HELD_AS.items()}
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        tensor.elem_type = held.get(tensor.elem_type, tensor.elem_type)
