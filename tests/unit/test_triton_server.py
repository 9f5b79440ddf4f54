"""The model repository for Triton Inference Server. No server was run: its own rules are checked as text."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import onnx
import pytest

from chai_export.bundle.bundle import MODEL_FILE, Bundle, record_files
from chai_export.bundle.engine_record import add_engine
from chai_export.bundle.manifest import EngineRecord
from chai_export.cli.main import main
from chai_export.engines import triton_server
from chai_export.engines.triton_server import write_model_repository
from chai_export.errors import ChaiError
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with an engine that is only bytes, and a library that is only bytes."""
    made = TinyModel(dtype="float16", bits=(4, 0)).write(tmp_path / "bundle", tokenizer=letters_tokenizer())
    directory = made.path / "engines" / "tensorrt"
    directory.mkdir(parents=True)
    (directory / "engine.plan").write_bytes(b"a plan")
    library = tmp_path / "libchai_tensorrt.so"
    library.write_bytes(b"a library")
    monkeypatch.setattr(triton_server, "find_library", lambda name: library)
    record = EngineRecord(
        backend="tensorrt",
        runtime_version="11.4.0.106",
        model_sha256=made.manifest.files[MODEL_FILE].sha256,
        max_batch=2,
        max_seq=64,
        op_version=2,
        gpu_architecture="sm_90",
        plugin_version="2",
        files=record_files(directory, made.path),
        created_with="test",
    )
    return add_engine(made, record)


def test_the_repository_has_the_layout_that_the_server_reads(bundle: Bundle, tmp_path: Path) -> None:
    root = write_model_repository(bundle, tmp_path / "out", name="tiny")
    assert [p.name for p in (root / "models").iterdir()] == ["tiny"]
    assert (root / "models/tiny/1/model.plan").read_bytes() == b"a plan"
    assert (root / "plugins/libchai_tensorrt.so").read_bytes() == b"a library"
    assert (root / "client/tokenizer.json").is_file()
    assert not (root / "client/model.onnx").exists()


def test_the_config_lists_every_tensor_of_the_graph(bundle: Bundle, tmp_path: Path) -> None:
    root = write_model_repository(bundle, tmp_path / "out")
    config = (root / "models/chai/config.pbtxt").read_text()
    graph = onnx.load(str(bundle.model_path)).graph
    for kind, values in (("input", graph.input), ("output", graph.output)):
        assert re.findall(rf'^{kind} \[{{ name: "([^"]+)"', config, re.MULTILINE) == [v.name for v in values]
    assert 'name: "past_value.0", data_type: TYPE_FP16, dims: [ -1, 4, -1, 4 ]' in config
    # As the engine has it.
    assert 'name: "past_key.0", data_type: TYPE_INT8, dims: [ -1, -1, -1, 4 ]' in config
    assert 'name: "head_map", data_type: TYPE_INT32, dims: [ 2, -1, 4 ]' in config
    assert "max_batch_size: 0" in config


def test_the_start_script_loads_the_plugin_before_the_models(bundle: Bundle, tmp_path: Path) -> None:
    root = write_model_repository(bundle, tmp_path / "out")
    server = tmp_path / "bin" / "tritonserver"
    server.parent.mkdir()
    server.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    server.chmod(0o755)
    environment = {**os.environ, "PATH": f"{server.parent}:{os.environ['PATH']}"}
    command = [str(root / "start.sh"), "--http-port=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.split("\n")
    assert words[0] == f"--model-repository={root}/models"
    assert words[1] == f"--backend-config=tensorrt,plugins={root}/plugins/libchai_tensorrt.so"
    assert words[2] == "--http-port=1"
    assert "TensorRT 11.4.0.106 and a GPU of sm_90" in (root / "start.sh").read_text()


def test_it_is_written_again_but_nothing_of_others_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    root = write_model_repository(bundle, tmp_path / "out")
    write_model_repository(bundle, root)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    with pytest.raises(ChaiError, match="will not be replaced"):
        write_model_repository(bundle, tmp_path / "mine")


def test_what_is_missing_is_named(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server, "find_library", lambda name: None)
    with pytest.raises(
        ChaiError, match=r"libchai_tensorrt\.so is not installed here and the engine needs it"
    ):
        write_model_repository(bundle, tmp_path / "out")
    (bundle.path / "engines/tensorrt/engine.plan").write_bytes(b"changed")
    with pytest.raises(ChaiError, match=r"engine\.plan was changed"):
        write_model_repository(bundle, tmp_path / "out")
    empty = TinyModel().write(tmp_path / "empty")
    with pytest.raises(ChaiError, match="has no tensorrt engine; run `chai-export build"):
        write_model_repository(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["package", str(bundle.path), "--triton-server", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "directory": str(out),
        "start": str(out / "start.sh"),
        "model": "chai",
    }
