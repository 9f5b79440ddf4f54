"""A source graph with another meaning is refused or caught by the proof; with the same meaning it matches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph import pipeline
from chai_export.graph.stage import rewrite
from tests.helpers.exported import exported, kept_of

NAME = "llama-gqa"
Mutation = Callable[[onnx.GraphProto], None]


def node_of(graph: onnx.GraphProto, op_type: str, index: int = 0) -> onnx.NodeProto:
    return [node for node in graph.node if node.op_type == op_type][index]


def maker_of(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.output)


def constant(graph: onnx.GraphProto, name: str, value: object, dtype: type = np.float32) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
    return name


def insert_before(
    graph: onnx.GraphProto, reader: onnx.NodeProto, slot: int, op_type: str, *extra: str
) -> None:
    """Put an operator between a node's input and what it read."""
    name = f"inserted_{op_type}_{len(graph.node)}"
    node = helper.make_node(op_type, [reader.input[slot], *extra], [name])
    position = list(graph.node).index(reader)
    graph.node.insert(position, node)
    graph.node[position + 1].input[slot] = name


def scale_on_one_side(graph: onnx.GraphProto) -> None:
    softmax = node_of(graph, "Softmax")
    score = maker_of(graph, maker_of(graph, softmax.input[0]).input[0])
    query = maker_of(graph, score.input[0])
    query.input[1] = constant(graph, "twice", 2.0)


def bias_before_softmax(graph: onnx.GraphProto) -> None:
    bias = constant(graph, "bias", np.linspace(-1, 1, 8).reshape(1, 8, 1, 1))
    insert_before(graph, node_of(graph, "Softmax"), 0, "Add", bias)


def tiny_bias_before_softmax(graph: onnx.GraphProto) -> None:
    insert_before(graph, node_of(graph, "Softmax"), 0, "Add", constant(graph, "bias", 1e-3))


def cap_before_softmax(graph: onnx.GraphProto) -> None:
    insert_before(graph, node_of(graph, "Softmax"), 0, "Tanh")


def cap_before_mask(graph: onnx.GraphProto) -> None:
    insert_before(graph, maker_of(graph, node_of(graph, "Softmax").input[0]), 0, "Tanh")


def clip_before_softmax(graph: onnx.GraphProto) -> None:
    low, high = constant(graph, "low", -3e38), constant(graph, "high", 50.0)
    insert_before(graph, node_of(graph, "Softmax"), 0, "Clip", low, high)


def scale_after_softmax(graph: onnx.GraphProto) -> None:
    softmax = node_of(graph, "Softmax")
    reader = next(node for node in graph.node if softmax.output[0] in node.input and node.op_type == "Where")
    insert_before(
        graph, reader, list(reader.input).index(softmax.output[0]), "Mul", constant(graph, "h", 0.5)
    )


def shifted_mask(graph: onnx.GraphProto) -> None:
    compare = node_of(graph, "LessOrEqual")
    insert_before(graph, compare, 1, "Add", constant(graph, "shift", 1, np.int64))


def window_of_1000(graph: onnx.GraphProto) -> None:
    compare = node_of(graph, "LessOrEqual")
    both = next(node for node in graph.node if compare.output[0] in node.input)
    keys, queries = compare.input[0], compare.input[1]
    position = list(graph.node).index(both)
    far = constant(graph, "far", 1000, np.int64)
    new = [
        helper.make_node("Sub", [queries, far], ["window_start"]),
        helper.make_node("Greater", [keys, "window_start"], ["in_window"]),
        helper.make_node("And", [compare.output[0], "in_window"], ["causal_in_window"]),
    ]
    for offset, node in enumerate(new):
        graph.node.insert(position + offset, node)
    slot = list(both.input).index(compare.output[0])
    graph.node[position + 3].input[slot] = "causal_in_window"


def chunks_of_8(graph: onnx.GraphProto) -> None:
    """Each query sees its own chunk only (Llama 4)."""
    compare = node_of(graph, "LessOrEqual")
    both = next(node for node in graph.node if compare.output[0] in node.input)
    keys, queries = compare.input[0], compare.input[1]
    position = list(graph.node).index(both)
    size = constant(graph, "chunk", 8, np.int64)
    new = [
        helper.make_node("Div", [queries, size], ["query_chunk"]),
        helper.make_node("Div", [keys, size], ["key_chunk"]),
        helper.make_node("Equal", ["key_chunk", "query_chunk"], ["in_chunk"]),
        helper.make_node("And", [compare.output[0], "in_chunk"], ["causal_in_chunk"]),
    ]
    for offset, node in enumerate(new):
        graph.node.insert(position + offset, node)
    slot = list(both.input).index(compare.output[0])
    graph.node[position + 4].input[slot] = "causal_in_chunk"


def no_padding_mask(graph: onnx.GraphProto) -> None:
    cast = next(node for node in graph.node if "attention_mask" in node.input)
    insert_before(graph, cast, 0, "Add", constant(graph, "one_more", 1, np.int64))


def values_of_other_heads(graph: onnx.GraphProto) -> None:
    expand = [node for node in graph.node if node.op_type == "Expand" and len(node.output) == 1][-1]
    index = constant(graph, "swapped", [1, 0], np.int64)
    name = "swapped_heads"
    node = helper.make_node("Gather", [expand.input[0], index], [name], axis=1)
    position = list(graph.node).index(expand)
    graph.node.insert(position, node)
    graph.node[position + 1].input[0] = name


def heads_in_turn_instead_of_groups(graph: onnx.GraphProto) -> None:
    for unsqueeze in [node for node in graph.node if node.op_type == "Unsqueeze"]:
        if unsqueeze.input[0].startswith("present.0"):
            unsqueeze.input[1] = constant(graph, f"axis_one_{unsqueeze.input[0]}", [1], np.int64)
    shapes = {
        node.input[1] for node in graph.node if node.op_type == "Expand" and "unsqueeze" in node.input[0]
    }
    for shape in shapes:
        concat = maker_of(graph, shape)
        if concat.op_type == "Concat" and len(concat.input) == 5:
            concat.input[1], concat.input[2] = (
                constant(graph, f"four_{shape}", [4], np.int64),
                constant(graph, f"two_{shape}", [2], np.int64),
            )


def cache_grows_along_heads(graph: onnx.GraphProto) -> None:
    concat = maker_of(graph, "present.0.key")
    next(attribute for attribute in concat.attribute if attribute.name == "axis").i = 1


def new_rows_before_old(graph: onnx.GraphProto) -> None:
    concat = maker_of(graph, "present.0.value")
    concat.input[0], concat.input[1] = concat.input[1], concat.input[0]


def positions_off_by_one(graph: onnx.GraphProto) -> None:
    reader = next(node for node in graph.node if "position_ids" in node.input)
    insert_before(graph, reader, 0, "Mul", constant(graph, "double", 2, np.int64))


BREAKING: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        bias_before_softmax, tiny_bias_before_softmax, cap_before_softmax, clip_before_softmax,
        scale_after_softmax, shifted_mask, chunks_of_8, no_padding_mask, values_of_other_heads,
        heads_in_turn_instead_of_groups, cache_grows_along_heads, new_rows_before_old,
    )
}  # fmt: skip


def mutate(mutation: Mutation, tmp_path: Path) -> Path:
    model = onnx.load(exported(NAME, 18, "sdpa"))
    mutation(model.graph)
    path = tmp_path / "mutated" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", BREAKING)
def test_another_meaning_is_never_written(name: str, tmp_path: Path) -> None:
    path = mutate(BREAKING[name], tmp_path)
    with pytest.raises(ChaiError, match=r"layer|attention|past") as caught:
        rewrite(path, Clusters(kept_of(NAME)), tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("mutation", [scale_on_one_side, positions_off_by_one])
def test_another_scale_or_position_is_carried_over(mutation: Mutation, tmp_path: Path) -> None:
    """These are meanings that the bundle can express; the proof then holds for the mutated source."""
    bundle = rewrite(mutate(mutation, tmp_path), Clusters(kept_of(NAME)), tmp_path / "bundle")
    nodes = [node for node in onnx.load(bundle.model_path).graph.node if node.domain == "chai"]
    scales = [next(a.f for a in node.attribute if a.name == "scale") for node in nodes]
    if mutation is scale_on_one_side:
        assert scales == pytest.approx([2.0 * 8**-0.25, 8**-0.5])


@pytest.mark.parametrize(
    ("mutation", "windows", "softcap"), [(window_of_1000, [1000, 1000], 0.0), (cap_before_mask, None, 1.0)]
)
def test_a_window_or_a_cap_is_carried_over(
    mutation: Mutation, windows: list[int] | None, softcap: float, tmp_path: Path
) -> None:
    bundle = rewrite(mutate(mutation, tmp_path), Clusters(kept_of(NAME)), tmp_path / "bundle")
    assert bundle.manifest.windows == windows
    first = next(node for node in onnx.load(bundle.model_path).graph.node if node.domain == "chai")
    stated = {attribute.name: attribute.f or attribute.i for attribute in first.attribute}
    assert (stated["window"], stated["softcap"]) == ((windows or [0])[0], softcap)


def swap_operands(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type in ("Mul", "Add", "And"):
            node.input[0], node.input[1] = node.input[1], node.input[0]


def identities_everywhere(graph: onnx.GraphProto) -> None:
    for op_type in ("Softmax", "Concat", "MatMul", "Where"):
        for node in [node for node in graph.node if node.op_type == op_type]:
            insert_before(graph, node, 0, "Identity")


def scalars_as_vectors(graph: onnx.GraphProto) -> None:
    for initializer in graph.initializer:
        if list(initializer.dims) == [] and initializer.data_type == onnx.TensorProto.FLOAT:
            initializer.dims.append(1)


def constants_as_nodes(graph: onnx.GraphProto) -> None:
    small = [item for item in graph.initializer if np.prod(item.dims, initial=1) < 16]
    for item in small:
        graph.initializer.remove(item)
        node = helper.make_node("Constant", [], [item.name], value=item)
        graph.node.insert(0, node)


def sizes_of_positions(graph: onnx.GraphProto) -> None:
    """torch.onnx takes the number of tokens from whatever has it, in larger models from the positions."""
    sizes = [node for node in graph.node if node.op_type == "Shape" and node.input[0] == "input_ids"]
    assert sizes
    for node in sizes:
        node.input[0] = "position_ids"


def other_names(graph: onnx.GraphProto) -> None:
    kept = {value.name for value in (*graph.input, *graph.output)} | {item.name for item in graph.initializer}
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [name if name in kept or not name else f"x{hash(name) & 0xFFFFFF}" for name in names]
    del graph.value_info[:]


@pytest.mark.parametrize(
    "mutation",
    [swap_operands, identities_everywhere, scalars_as_vectors, constants_as_nodes, sizes_of_positions,
     other_names],
)  # fmt: skip
def test_the_same_meaning_in_other_words_still_matches(mutation: Mutation, tmp_path: Path) -> None:
    bundle = rewrite(mutate(mutation, tmp_path), Clusters(kept_of(NAME)), tmp_path / "bundle")
    assert bundle.manifest.num_layers == 2


def test_a_wrong_rewrite_does_not_pass_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole-model proof by itself: break the wiring, not the attention, where rows are not looked at."""
    transform = pipeline.transform

    def swapped(model, *arguments):  # type: ignore[no-untyped-def]
        transform(model, *arguments)
        positions = next(node for node in model.graph if node.outputs[0].name == "token_positions")
        column = positions.inputs[0].producer().inputs[0]
        positions.replace_input_with(0, column)  # without the length of the past

    monkeypatch.setattr(pipeline, "transform", swapped)
    with pytest.raises(ChaiError, match="is made of positions"):  # the proof of rows sees it first
        rewrite(exported(NAME), Clusters(kept_of(NAME)), tmp_path / "bundle")
    monkeypatch.setattr(pipeline, "prove_rows", lambda *arguments: None)
    with pytest.raises(ChaiError, match="differs from the source"):
        rewrite(exported(NAME), Clusters(kept_of(NAME)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
