"""Weights of a rewritten model: taken over, or written anew when that saves space; holes stay holes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from chai_export.graph.rewrite.weights import write_model


def model_with(directory: Path, *sizes: int, used: int | None = None, files: int = 1) -> ir.Model:
    """Initializers stored in ``files`` data files, of which the model has the first ``used``."""
    tensors = [
        ir.Tensor(np.full(size, index, np.float32), name=f"w{index}") for index, size in enumerate(sizes)
    ]
    directory.mkdir()
    for file in range(files):
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 20})
        for tensor in tensors[file::files]:
            value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT))
            value.shape = ir.Shape(list(tensor.shape))
            graph.register_initializer(value)
        ir.save(ir.Model(graph, ir_version=10), directory / f"{file}.onnx", external_data=f"{file}.data")
    loaded = [ir.load(directory / f"{file}.onnx") for file in range(files)]
    chosen = sorted(
        (value for model in loaded for value in model.graph.initializers.values()), key=lambda v: v.name or ""
    )[:used]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20})
    for value in chosen:
        copy = ir.Value(name=value.name, const_value=value.const_value, type=value.type, shape=value.shape)
        graph.register_initializer(copy)
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"copied", "cloned"}),
        ({"used": 1}, {"written"}),
        ({"files": 2}, {"written"}),
    ],
)
def test_how_weights_get_into_the_bundle(options: dict[str, int], expected: set[str], tmp_path: Path) -> None:
    model = model_with(tmp_path / "source", 5000, 4000, **options)
    out = tmp_path / "out"
    out.mkdir()
    assert write_model(model, model, out, take=False) in expected
    written = ir.load(out / "model.onnx").graph.initializers
    for index, value in enumerate(written.values()):
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), np.full(value.const_value.size, index))
    assert {path.name for path in out.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "source" / "0.data").exists()


def test_weights_of_an_intermediate_file_are_moved_and_still_read_by_the_source(tmp_path: Path) -> None:
    model = model_with(tmp_path / "source", 5000)
    source = model_with(tmp_path / "same", 5000)
    for value in source.graph.initializers.values():
        value.const_value = model.graph.initializers[str(value.name)].const_value
    out = tmp_path / "out"
    out.mkdir()
    assert write_model(model, source, out, take=True) == "moved"
    assert not (tmp_path / "source" / "0.data").exists()
    (value,) = source.graph.initializers.values()
    assert value.const_value is not None
    assert value.const_value.numpy().shape == (5000,)


def test_holes_stay_holes(tmp_path: Path) -> None:
    model = model_with(tmp_path / "source", 5000)
    data = tmp_path / "source" / "0.data"
    size = 2**26
    with data.open("r+b") as file:
        file.truncate(size)
    (value,) = model.graph.initializers.values()
    value.const_value = ir.ExternalTensor(
        "0.data", 0, size, ir.DataType.FLOAT, shape=ir.Shape([size // 4]), name="w0", base_dir=data.parent
    )
    out = tmp_path / "out"
    out.mkdir()
    write_model(model, model, out, take=False)
    copy = out / "model.onnx.data"
    assert copy.stat().st_size == size
    assert copy.stat().st_blocks * 512 < size // 4
    assert copy.read_bytes()[:20000] == data.read_bytes()[:20000]
