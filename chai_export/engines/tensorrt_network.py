"""The ONNX graph that TensorRT's parser reads: op nodes that name the plugin and where its kernels lie."""

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
