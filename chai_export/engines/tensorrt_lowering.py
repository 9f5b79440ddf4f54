"""Operators of ONNX Runtime's own, written in ONNX's of opset 23, which TensorRT takes from 10.15 on.

Weights in integers are in :mod:`chai_export.engines.tensorrt_integer_weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from chai_export.engines import tensorrt_integer_activations, tensorrt_integer_weights
from chai_export.engines.tensorrt_integer_weights import IntegerWeights
from chai_export.engines.tensorrt_writer import NodeWriter, refuse

MICROSOFT = "com.microsoft"
_OPSET = 23
"""The first with RMSNormalization and RotaryEmbedding."""


def lower_operators(model: onnx.ModelProto, directory: Path, weights: Path, location: str) -> None:
    """Replace, in place, the operators that are ONNX Runtime's own and have a meaning in ONNX's.

    Args:
        model: of a bundle, without its external data.
        directory: where its external data lies.
        weights: file for the integer weights in TensorRT's form; made only if there are any.
        location: of that file in the model.

    Raises:
        ChaiError: a use of them that has no equal, with the node and what to do.
    """
    if not any((node.domain, node.op_type) in LOWERED.keys() - _ASIDE for node in model.graph.node):
        return
    with IntegerWeights(weights, location) as integers:
        writer = NodeWriter(model, directory)
        nodes = list(model.graph.node)
        for node in nodes:
            lower = LOWERED.get((node.domain, node.op_type))
            if lower is None:
                writer.nodes.append(node)
            else:
                writer.enter(node)
                lower(writer, node, integers)
    writer.require_opset(_OPSET)
    writer.finish()


def _simplified_norm(writer: NodeWriter, node: onnx.NodeProto, _: IntegerWeights) -> None:
    if any(node.output[1:]) or writer.attribute("axis", -1) != -1:
        refuse(node, "over several axes, or with its inverse deviation as an output")
    _rms_norm(writer, node, node.input[0], node.input[1])


def _skip_simplified_norm(writer: NodeWriter, node: onnx.NodeProto, _: IntegerWeights) -> None:
    """Outputs: normalised; mean and inverse deviation, which inference has no use for; the sum."""
    if any(node.output[1:3]):
        refuse(node, "with its mean or inverse deviation as an output")
    terms = [name for name in (*node.input[:2], *node.input[3:4]) if name]
    total = terms[0]
    for term in terms[1:]:
        last = term is terms[-1]
        wanted = node.output[3] if last and len(node.output) > 3 and node.output[3] else None
        total = writer.add("Add", [total, term], output=wanted)
    _rms_norm(writer, node, total, node.input[2])


def _rms_norm(writer: NodeWriter, node: onnx.NodeProto, values: str, scale: str) -> None:
    epsilon = writer.attribute("epsilon", 1e-5)
    writer.add("RMSNormalization", [values, scale], output=node.output[0], axis=-1, epsilon=epsilon)


def _rotary_embedding(writer: NodeWriter, node: onnx.NodeProto, _: IntegerWeights) -> None:
    """Of [B, H, S, D], or of [B, S, H·D], at positions [B, S]; ONNX's has the tables before the positions."""
    values, positions, cosine, sine = node.input
    if writer.attribute("is_packed_batching", 0) or writer.attribute("scale", 1.0) != 1.0:
        refuse(node, "with packed batches or a scale")
    if len(writer.shape(positions)) != 2:
        refuse(node, "with one offset in place of positions")
    attributes = {
        name: writer.attribute(name, 0) for name in ("interleaved", "num_heads", "rotary_embedding_dim")
    }
    shape = writer.shape(values)
    if len(shape) == 3 and not attributes["num_heads"]:
        # Without their number a head is as long as what is rotated.
        width, rotated = shape[-1], 2 * int(writer.shape(cosine)[-1])
        if not isinstance(width, int):
            refuse(node, "without the number of heads")
        attributes["num_heads"] = width // rotated
    writer.add("RotaryEmbedding", [values, cosine, sine, positions], output=node.output[0], **attributes)


_ASIDE = {("", "Gather"), ("", "DequantizeLinear")}
"""Lowered where they stand in a graph of quantize_dynamic, and no reason to touch another."""
LOWERED: dict[tuple[str, str], Callable[[NodeWriter, onnx.NodeProto, IntegerWeights], Any]] = {
    ("", "SimplifiedLayerNormalization"): _simplified_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_simplified_norm,
    (MICROSOFT, "RotaryEmbedding"): _rotary_embedding,
    (MICROSOFT, "MatMulNBits"): tensorrt_integer_weights.multiply,
    ("", "DynamicQuantizeLinear"): tensorrt_integer_activations.quantise,
    ("", "MatMulInteger"): tensorrt_integer_activations.multiply,
    ("", "Gather"): tensorrt_integer_activations.gather,
    ("", "DequantizeLinear"): tensorrt_integer_activations.dequantise,
}
