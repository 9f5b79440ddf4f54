"""The ONNX graph that TensorRT's parser reads: with the plugin, or with the function body in its terms."""

from __future__ import annotations

import onnx

from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError
from chai_export.op.schema import DOMAIN, OP_TYPE

PLUGIN_VERSION_ATTRIBUTE = "plugin_version"
PLUGIN_NAMESPACE_ATTRIBUTE = "plugin_namespace"
KERNEL_DIRECTORY_ATTRIBUTE = "kernel_directory"
PARSED_SINCE = {"RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15)}
"""Operators that TensorRT's parser took up late, and the version that did (its change log)."""


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


def require_parsed(bundle: Bundle, version: tuple[int, int]) -> None:
    """Refuse a graph with operators that a version's parser is known not to take.

    Raises:
        ChaiError: naming the operator and the version that takes it.
    """
    graph = onnx.load(str(bundle.model_path), load_external_data=False).graph
    for node in graph.node:
        since = PARSED_SINCE.get(node.op_type, (0, 0))
        if version < since:
            needed = ".".join(map(str, since))
            raise ChaiError(
                f"{bundle.model_path} uses {node.op_type}, which TensorRT takes from {needed} on and this is "
                f"{'.'.join(map(str, version))}; pip install --upgrade tensorrt"
            )


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
