"""Files whose caches are codes: attention on rows as they were computed, cached in the bundle's own bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from chai_export.bundle.bundle import Bundle
from chai_export.cli.main import main
from chai_export.graph.read.load import load_graph
from chai_export.graph.read.quantised_caches import has_quantised_caches
from chai_export.graph.stage import rewrite
from chai_export.runtime.runner import load
from tests.helpers.onnx_fixtures import ALL, Fixture

(FIXTURE,) = (fixture for fixture in ALL if fixture.name.endswith("int8-cache"))
HEAD_DIM = 16


def in_four_bits(folder: Path) -> Path:
    """The fixture with two codes of keys and values in each byte."""
    shutil.copytree(FIXTURE.path, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = TensorProto.UINT8
            value.type.tensor_type.shape.dim[3].dim_value = HEAD_DIM // 2
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "kv_cache_bit_width":
                attribute.i = 4
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.fixture(params=[8, 4], ids=["8 bits", "4 bits"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FIXTURE.path if request.param == 8 else in_four_bits(tmp_path / "source")


def of_float32() -> Fixture:
    """The same model, exported with caches in float32."""
    return next(fixture for fixture in ALL if fixture.name == "G-genai-0.18.0-cpu-fp32-gqa")


def test_codes_are_found_and_taken_off(source: Path) -> None:
    from chai_export.graph.read.load import read_model

    assert has_quantised_caches(read_model(source).graph)
    assert not has_quantised_caches(load_graph(source).graph)
    assert not has_quantised_caches(read_model(of_float32().path).graph)


def test_rows_are_those_of_the_model_in_float32(source: Path, tmp_path: Path) -> None:
    ours = load(rewrite(source, None, tmp_path / "ours").path, heads="all")
    plain = load(rewrite(of_float32().path, None, tmp_path / "plain").path, heads="all")
    tokens = FIXTURE.reference["input_ids"].tolist() * 2
    chunks = [12, 5, 7]
    np.testing.assert_array_equal(ours.logits(tokens, chunks=chunks), plain.logits(tokens, chunks=chunks))


def test_the_command_caches_them_in_8_bits_of_ours(source: Path, tmp_path: Path) -> None:
    assert main(["rewrite", str(source), "-o", str(tmp_path / "bundle"), "--json"]) == 0
    manifest = Bundle.load(tmp_path / "bundle").manifest
    assert (manifest.key_bits, manifest.value_bits) == ([8, 8], [8, 8])
    assert manifest.head_dim == manifest.value_head_dim == HEAD_DIM
