"""Mistakes in the graph of a bundle, one at a time: what a wrong rewrite would have done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from chai_export.bundle.bundle import Bundle, finalise

Mistake = Callable[[onnx.ModelProto], None]
POSITIONS = "token_positions"
"""The value of a bundle's graph that rotary embedding reads."""


def with_mistake(bundle: Bundle, folder: Path, mistake: Mistake) -> Bundle:
    """The bundle with another graph, and hashes that fit."""
    shutil.copytree(bundle.path, folder)
    model = onnx.load(bundle.model_path)
    mistake(model)
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, folder / "model.onnx")
    finalise(folder, bundle.manifest)
    return Bundle.load(folder)


def attentions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "chai"]


def larger_scores(model: onnx.ModelProto) -> None:
    """Scores of the last layer 1 % larger."""
    _attribute(attentions(model)[-1], "scale").f *= 1.01


def exchanged_values(model: onnx.ModelProto) -> None:
    """Two value heads of the last layer exchanged."""
    heads = next(v for v in model.graph.input if "value" in v.name).type.tensor_type.shape.dim[1].dim_value
    _reorder(model, attentions(model)[-1], "value", [1, 0, *range(2, heads)])


def exchanged_queries(model: onnx.ModelProto) -> None:
    """The first query head of the first layer exchanged with the last one."""
    heads = (
        next(v for v in model.graph.input if "head_map" in v.name).type.tensor_type.shape.dim[-1].dim_value
    )
    _reorder(model, attentions(model)[0], "query", [heads - 1, *range(1, heads - 1), 0])


def wrong_head_map(model: onnx.ModelProto) -> None:
    """The last layer reads the map that its last call left with its first and last head exchanged."""
    node = attentions(model)[-1]
    (name,) = (name for name in node.input if "head_map" in name)
    heads = _query_heads(model)
    _gather(model, node, list(node.input).index(name), [heads - 1, *range(1, heads - 1), 0], "map")


def narrow_window(model: onnx.ModelProto) -> None:
    """The last layer does not see the first token from the 65th one on."""
    _attribute(attentions(model)[-1], "window").i = 64


def late_positions(model: onnx.ModelProto) -> None:
    """Rotary positions from the 16th on too high by one."""
    graph = model.graph
    readers = [node for node in graph.node if POSITIONS in node.input]
    for node in readers:
        node.input[:] = ["late_positions" if name == POSITIONS else name for name in node.input]
    graph.initializer.append(numpy_helper.from_array(np.array(16, np.int64), "sixteen"))
    added = [
        helper.make_node("GreaterOrEqual", [POSITIONS, "sixteen"], ["is_late"]),
        helper.make_node("Cast", ["is_late"], ["one_if_late"], to=onnx.TensorProto.INT64),
        helper.make_node("Add", [POSITIONS, "one_if_late"], ["late_positions"]),
    ]
    first = min(list(graph.node).index(node) for node in readers)
    for offset, node in enumerate(added):
        graph.node.insert(first + offset, node)


def other_weights(model: onnx.ModelProto) -> None:
    """Eight scales of one quantised weight 2 % larger."""
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer)
        if array.dtype == np.float32 and "scale" in initializer.name and array.size >= 16:
            wrong = array.copy()
            wrong.reshape(-1)[:8] *= 1.02
            initializer.CopyFrom(numpy_helper.from_array(wrong, initializer.name))
            return
    raise AssertionError("no scales")


def other_layer(model: onnx.ModelProto) -> None:
    """The last layer reads the keys that the first one computed."""
    first, last = attentions(model)[0], attentions(model)[-1]
    last.input[1] = first.input[1]


def _query_heads(model: onnx.ModelProto) -> int:
    value = next(value for value in model.graph.input if value.name == "head_map")
    heads: int = value.type.tensor_type.shape.dim[-1].dim_value
    return heads


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def _reorder(model: onnx.ModelProto, node: onnx.NodeProto, name: str, order: list[int]) -> None:
    _gather(model, node, ("query", "key", "value").index(name), order, name)


def _gather(model: onnx.ModelProto, node: onnx.NodeProto, slot: int, order: list[int], name: str) -> None:
    """Put the heads (axis 1) of an input in another order."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(order), f"order_of_{name}"))
    gather = helper.make_node("Gather", [node.input[slot], f"order_of_{name}"], [f"reordered_{name}"], axis=1)
    model.graph.node.insert(list(model.graph.node).index(node), gather)
    node.input[slot] = f"reordered_{name}"
