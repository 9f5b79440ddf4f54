"""The ONNX graph that TensorRT's parser reads: with the plugin, or with the function body in its terms."""

from __future__ import annotations

import onnx

from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError
from chai_export.op.schema import DOMAIN, OP_TYPE

PLUGIN_VERSION_ATTRIBUTE = "plugin_version"
PLUGIN_NAMESPACE_ATTRIBUTE = "plugin_namespace"
KERNEL_DIRECTORY_ATTRIBUTE = "kernel_directory"


def plugin_network(bundle: Bundle, version: str, namespace: str, kernel_directory: str) -> onnx.ModelProto:
    """The bundle's graph without the function body, its op nodes marked for the plugin.

    Parsers differ in whether a function or a plugin of the same name goes first, so the function is removed.
    Weights stay where they are: the result must be saved in the bundle's directory.

    Raises:
        ChaiError: there is not exactly one op node per layer.
    """
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    if len(nodes) != bundle.manifest.num_layers:
        raise ChaiError(
            f"{bundle.model_path} has {len(nodes)} {OP_TYPE} nodes for {bundle.manifest.num_layers} layers; "
            "export or rewrite again"
        )
    functions = [f for f in model.functions if (f.domain, f.name) != (DOMAIN, OP_TYPE)]
    del model.functions[:]
    model.functions.extend(functions)
    marks = {
        PLUGIN_VERSION_ATTRIBUTE: version,
        PLUGIN_NAMESPACE_ATTRIBUTE: namespace,
        KERNEL_DIRECTORY_ATTRIBUTE: kernel_directory,
    }
    for node in nodes:
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in marks.items())
    return model


def portable_network(bundle: Bundle) -> onnx.ModelProto:
    """The bundle's graph with the function body, for those who may not load plugins.

    TensorRT's parser documents CumSum for floating point only, so the one over integers (ranks of kept heads,
    small and exact in float32) is done there. Weights stay where they are.
    """
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    for function in model.functions:
        if (function.domain, function.name) == (DOMAIN, OP_TYPE):
            _sum_in_float(function)
    return model


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


def _sum_in_float(function: onnx.FunctionProto) -> None:
    nodes = []
    for node in function.node:
        if node.op_type != "CumSum":
            nodes.append(node)
            continue
        values, sums = f"{node.output[0]}_values", f"{node.output[0]}_sums"
        summed = onnx.helper.make_node("CumSum", [values, node.input[1]], [sums])
        summed.attribute.extend(node.attribute)
        nodes += [
            onnx.helper.make_node("Cast", [node.input[0]], [values], to=onnx.TensorProto.FLOAT),
            summed,
            onnx.helper.make_node("Cast", [sums], list(node.output), to=onnx.TensorProto.INT64),
        ]
    del function.node[:]
    function.node.extend(nodes)
