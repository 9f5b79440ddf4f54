"""Damaged or unsuitable files end in one line that names the cause; nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph.explain.count_ops import count_ops
from chai_export.graph.read.load import read_model
from chai_export.graph.stage import explain, rewrite
from tests.helpers.exported import exported, kept_of

NAME = "llama-gqa"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    source = exported(NAME)
    target = tmp_path / "source"
    target.mkdir()
    for file in (source, Path(f"{source}.data")):
        shutil.copy(file, target)
    return target / source.name


def refuse(
    path: Path, tmp_path: Path, reason: str, kept: tuple[int, ...] = (1, 1), **options: object
) -> None:
    with pytest.raises(ChaiError, match=reason) as caught:
        rewrite(path, Clusters(kept), tmp_path / "bundle", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing.onnx", tmp_path, "does not exist")


def test_directory_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", tmp_path, "no ONNX file")


def test_directory_with_several_models(copy: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(copy, copy.with_name(name))
    copy.unlink()
    refuse(copy.parent, tmp_path, "several ONNX files: a.onnx, b.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 8])
def test_damaged_file(content: bytes, copy: Path, tmp_path: Path) -> None:
    copy.write_bytes(content)
    refuse(copy, tmp_path, "not a readable ONNX model")
    with pytest.raises(ChaiError):
        explain(copy)
    with pytest.raises(ChaiError):
        count_ops(copy)


def test_truncated_file(copy: Path, tmp_path: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:-5000])
    refuse(copy, tmp_path, "is not a readable ONNX model")


def test_missing_weights(copy: Path, tmp_path: Path) -> None:
    Path(f"{copy}.data").unlink()
    refuse(copy, tmp_path, r"decoder\.onnx\.data, which is missing")


def test_truncated_weights(copy: Path, tmp_path: Path) -> None:
    data = Path(f"{copy}.data")
    data.write_bytes(data.read_bytes()[:1000])
    refuse(copy, tmp_path, "too short")


def test_weights_outside_the_directory(copy: Path, tmp_path: Path) -> None:
    shutil.move(f"{copy}.data", tmp_path / "decoder.onnx.data")
    model = onnx.load(copy, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../decoder.onnx.data"
    copy.write_bytes(model.SerializeToString())
    refuse(copy, tmp_path, "outside its directory")


@pytest.mark.parametrize(
    ("kept", "reason"),
    [((1,), "1 layers, the model has 2"), ((1, 3), "layer 1 keeps 3"), ((1, 0), "layer 1 is 0")],
)
def test_clusters_that_do_not_fit(kept: tuple[int, ...], reason: str, tmp_path: Path) -> None:
    refuse(exported(NAME), tmp_path, reason, kept)


def test_probe_of_no_tokens(tmp_path: Path) -> None:
    refuse(exported(NAME), tmp_path, "--probe-tokens is 0", kept_of(NAME), probe_tokens=0)


def test_missing_tokenizer(tmp_path: Path) -> None:
    refuse(exported(NAME), tmp_path, "no tokenizer", kept_of(NAME), tokenizer=tmp_path)


def plain_model(path: Path, *names: str) -> Path:
    """A model without attention whose inputs have the given names."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in names]
    table = onnx.numpy_helper.from_array(np.zeros((8, 4), np.float32), "table")
    node = helper.make_node("Gather", ["table", names[0]], ["logits"])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 4])
    graph = helper.make_graph([node], "plain", inputs, [output], [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_model_without_attention(tmp_path: Path) -> None:
    path = plain_model(tmp_path / "plain.onnx", "input_ids")
    refuse(path, tmp_path, "no attention found")
    assert explain(path).verdict == "cannot be rewritten: no attention found"


def test_unknown_inputs_are_named(copy: Path, tmp_path: Path) -> None:
    model = onnx.load(copy)
    (reader,) = [node for node in model.graph.node if "position_ids" in node.input]
    model.graph.input.append(helper.make_tensor_value_info("offsets", TensorProto.INT64, ["batch", "tokens"]))
    node = helper.make_node("Add", ["position_ids", "offsets"], ["shifted"])
    reader.input[list(reader.input).index("position_ids")] = "shifted"
    model.graph.node.insert(0, node)
    path = tmp_path / "source" / "changed.onnx"
    onnx.save(model, path)
    refuse(path, tmp_path, "does not know .offsets.")


def test_an_old_opset(copy: Path, tmp_path: Path) -> None:
    model = onnx.load(copy)
    model.opset_import[0].version = 17
    path = tmp_path / "source" / "old.onnx"
    onnx.save(model, path)
    refuse(path, tmp_path, "opset 17")


def changed(copy: Path, edit: Callable[[onnx.GraphProto], None]) -> Path:
    """The model with its graph edited, weights where they are."""
    model = onnx.load(copy, load_external_data=False)
    edit(model.graph)
    copy.write_bytes(model.SerializeToString())
    return copy


def node_of(graph: onnx.GraphProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == op_type)


@pytest.mark.parametrize("op_type", ["Gather", "MatMul", "Attention", "Concat", "RMSNormalization"])
@pytest.mark.parametrize("name", ["", "nowhere"])
def test_values_that_nobody_makes(op_type: str, name: str, copy: Path, tmp_path: Path) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        node_of(graph, op_type).input[1 if op_type == "MatMul" else 0] = name

    reason = "reads 'nowhere', which nothing produces" if name else "has an empty name for input"
    refuse(changed(copy, edit), tmp_path, rf"decoder\.onnx is broken: node .* \({op_type}\) {reason}")


def test_a_value_that_is_made_twice(copy: Path, tmp_path: Path) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        first, second = [node for node in graph.node if node.op_type == "MatMul"][:2]
        second.output[0] = first.output[0]

    refuse(changed(copy, edit), tmp_path, "produces .*, and so does another node")


def tensor(dtype: int, dims: list[int], **fields: object) -> TensorProto:
    return TensorProto(name="claim", data_type=dtype, dims=dims, **fields)  # type: ignore[arg-type]


CLAIMS = {
    "2^31 in 256 bytes": tensor(TensorProto.FLOAT, [2**31], raw_data=bytes(256)),
    "2^40 in 256 bytes": tensor(TensorProto.FLOAT, [2**40], raw_data=bytes(256)),
    "2^62 in 256 bytes": tensor(TensorProto.FLOAT, [2**31, 2**31], raw_data=bytes(256)),
    "2^62 in a list": tensor(TensorProto.INT64, [2**62], int64_data=[1, 2]),
    "nothing": tensor(TensorProto.FLOAT16, [7]),
    "too much": tensor(TensorProto.INT32, [3], raw_data=bytes(16)),
    "half a byte short": tensor(TensorProto.INT4, [5], raw_data=bytes(2)),
    "negative": tensor(TensorProto.FLOAT, [-4, -16], raw_data=bytes(256)),
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
def test_tensors_that_hold_something_else_than_they_claim(
    claim: str, where: str, copy: Path, tmp_path: Path
) -> None:
    """Each of these took all memory, or minutes, before it failed."""
    value = CLAIMS[claim]
    constant = helper.make_node("Constant", [], ["claimed"], value=value)

    def edit(graph: onnx.GraphProto) -> None:
        if where == "initializer":
            graph.initializer.append(value)
        elif where == "constant":
            graph.node.insert(0, constant)
        else:
            output = helper.make_tensor_value_info("claimed", value.data_type, None)
            branch = helper.make_graph([constant], "branch", [], [output])
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
            graph.node.insert(
                0, helper.make_node("If", ["yes"], ["either"], then_branch=branch, else_branch=branch)
            )

    refuse(changed(copy, edit), tmp_path, "decoder.onnx is broken: tensor 'claim' (claims|has dims)")


WHOLE = [
    *(
        tensor(dtype, [5], raw_data=bytes(size))
        for dtype, size in [(1, 20), (7, 40), (9, 5), (10, 10), (22, 3)]
    ),
    tensor(TensorProto.FLOAT, [2, 2], float_data=[1, 2, 3, 4]),
    tensor(TensorProto.FLOAT16, [2], int32_data=[1, 2]),
    tensor(TensorProto.UINT4, [5], int32_data=[1, 2, 3]),
    tensor(TensorProto.COMPLEX64, [2], float_data=[1, 2, 3, 4]),
    tensor(TensorProto.STRING, [2], string_data=[b"a", b"b"]),
    tensor(TensorProto.FLOAT, [], float_data=[1]),
    tensor(TensorProto.FLOAT, [0]),
]


@pytest.mark.parametrize("held", WHOLE, ids=lambda held: f"{held.data_type}-{held.dims}")
def test_tensors_that_hold_what_they_claim_are_read(held: TensorProto, tmp_path: Path) -> None:
    path = plain_model(tmp_path / "plain.onnx", "input_ids")
    read_model(changed(path, lambda graph: graph.initializer.append(held)))


def test_nothing_is_said_where_shapes_cannot_be_inferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[ShapeInferenceError] of some operator")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    rewrite(exported(NAME), Clusters(kept_of(NAME)), tmp_path / "bundle")
    assert capfd.readouterr().err == ""
