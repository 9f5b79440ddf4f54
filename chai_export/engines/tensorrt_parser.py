"""TensorRT's ONNX parser: what it takes, the network it makes of a graph, and its complaints in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from chai_export.errors import ChaiError, reason
from chai_export.op.schema import DOMAIN

PARSED_SINCE = {"RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15)}
"""Operators that TensorRT's parser took up late, and the version that did (its change log)."""
_NEW_IN_23 = {"Attention", "RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter"}
"""Operators of opset 23 and 24 that an exporter writes as older ones when it is asked for a lower opset."""
_OWN_DOMAINS = ("", "ai.onnx", DOMAIN)
_OTHERWISE = "export the model with `chai-export export`, or use --backend onnxruntime"


def require_known_domains(model: onnx.ModelProto) -> None:
    """Refuse a graph with operators that are not ONNX's, by name.

    Raises:
        ChaiError: naming them, how many there are and what to do.
    """
    counts: dict[str, int] = {}
    for node in _nodes(model):
        if node.domain not in _OWN_DOMAINS:
            name = f"{node.domain}.{node.op_type}"
            counts[name] = counts.get(name, 0) + 1
    if counts:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise ChaiError(f"the graph uses operators that TensorRT does not have: {listed}; {_OTHERWISE}")


def require_parsed(tensorrt: Any, polygraphy: Any, model: onnx.ModelProto, version: tuple[int, int]) -> None:
    """Refuse a graph with operators that this version's parser does not take.

    Raises:
        ChaiError: naming an operator and the version that takes it, or all of them.
    """
    types = sorted({node.op_type for node in _nodes(model) if node.domain != DOMAIN})
    for op_type in types:
        since = PARSED_SINCE.get(op_type, (0, 0))
        if version < since:
            needed, found = (".".join(map(str, numbers)) for numbers in (since, version))
            raise ChaiError(
                f"the graph uses {op_type}, which TensorRT takes from {needed} on and this is {found}; "
                "pip install --upgrade tensorrt"
            )
    _, _, parser = _make_parser(tensorrt, polygraphy)
    unknown = [op_type for op_type in types if not parser.supports_operator(op_type)]
    if unknown:
        raise ChaiError(
            f"the parser of TensorRT {tensorrt.__version__} does not take {', '.join(unknown)}; "
            f"{_advice(unknown)}"
        )


def parse_network(tensorrt: Any, polygraphy: Any, path: Path, plugin_layers: int) -> tuple[Any, Any, Any]:
    """The builder, network and parser of an ONNX file; TensorRT needs all three until it has built.

    Raises:
        ChaiError: the parser does not take the graph, or makes something else of it than we wrote.
    """
    builder, network, parser = _make_parser(tensorrt, polygraphy)
    if not parser.parse_from_file(str(path)):
        raise parse_error([parser.get_error(index) for index in range(parser.num_errors)])
    check_network(tensorrt, network, plugin_layers)
    return builder, network, parser


def parse_error(errors: Iterable[Any]) -> ChaiError:
    """What the parser reported last: earlier ones are of attempts, such as a plugin of the name."""
    last = next(iter(reversed(list(errors))), None)
    if last is None:
        return ChaiError(f"TensorRT's ONNX parser does not take the graph and does not say why; {_OTHERWISE}")
    operator, name = last.node_operator(), last.node_name()
    where = f"{operator} ({name})" if operator else "the graph"
    return ChaiError(
        f"TensorRT's ONNX parser does not take {where}: {reason(last.desc())}; {_advice([operator])}"
    )


def check_network(tensorrt: Any, network: Any, plugin_layers: int) -> None:
    """Compare a parsed network with what it should hold.

    Raises:
        ChaiError: it has another number of plugin layers, or an input whose values decide shapes.
    """
    layers = (network.get_layer(i) for i in range(network.num_layers))
    found = sum(layer.type == tensorrt.LayerType.PLUGIN_V3 for layer in layers)
    if found != plugin_layers:
        raise ChaiError(
            f"TensorRT {tensorrt.__version__} parsed {found} plugin layers for {plugin_layers} attentions; "
            "report this with the TensorRT version"
        )
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    shape_inputs = [network_input.name for network_input in inputs if network_input.is_shape_tensor]
    if shape_inputs:
        raise ChaiError(
            f"TensorRT reads {', '.join(shape_inputs)} as a shape, which no profile can bound; "
            "export or rewrite the bundle again with this version of chai_export"
        )


def _make_parser(tensorrt: Any, polygraphy: Any) -> tuple[Any, Any, Any]:
    builder, network = polygraphy.create_network(strongly_typed=True)
    logger = polygraphy.get_trt_logger()
    tensorrt.init_libnvinfer_plugins(logger, "")  # some of ONNX's operators are plugins of TensorRT's own
    return builder, network, tensorrt.OnnxParser(network, logger)


def _advice(operators: Iterable[str]) -> str:
    """A lower opset helps where the operator came with opset 23 or 24, and nowhere else."""
    if set(operators) <= _NEW_IN_23:
        return "pip install --upgrade tensorrt, or rewrite a graph that was exported with opset 22 or lower"
    return _OTHERWISE


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of functions and subgraphs included."""
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                pending.extend(graph.node)
