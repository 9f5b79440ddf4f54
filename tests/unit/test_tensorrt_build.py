"""Building TensorRT engines: the network, the profiles and the record, with TensorRT played."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.engines import tensorrt as engine_module
from chai_export.engines.build import build
from chai_export.engines.tensorrt import NETWORK_FILE
from chai_export.engines.tensorrt_network import portable_network
from chai_export.engines.tensorrt_profiles import profiles
from chai_export.errors import ChaiError
from chai_export.runtime import tensorrt_environment as environment
from chai_export.runtime import tensorrt_session as session_module
from chai_export.runtime.native import SWITCH
from chai_export.runtime.tensorrt_environment import Gpu
from tests.helpers.played_tensorrt import GPU, MODEL, Played, attributes, make_played, op_nodes
from tests.helpers.tiny_graph import TinyModel

pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'chai-export[dev]'")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return MODEL.write(tmp_path / "bundle")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libchai_tensorrt.so"
    path.write_bytes(b"a library")
    return path


@pytest.fixture
def played(bundle: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    return make_played(bundle, library, monkeypatch, tmp_path)


def test_the_network_names_the_plugin_and_its_kernels(bundle: Bundle, played: Played) -> None:
    build(bundle, "tensorrt", 4, 64)
    assert played.parsed is not None
    saved = onnx.load(str(bundle.path / NETWORK_FILE))
    for model in (played.parsed, saved):
        assert not model.functions
        assert len(op_nodes(model)) == len(MODEL.kept)
        for node in op_nodes(model):
            given = attributes(node)
            assert (given["plugin_version"], given["plugin_namespace"]) == (b"1", b"chai")
            assert {"scale", "probe_tokens", "online"} <= given.keys()
    assert attributes(op_nodes(saved)[0])["kernel_directory"] == b"engines/tensorrt/kernels"
    assert attributes(op_nodes(played.parsed)[0])["kernel_directory"].startswith(b"/")


def test_profiles_span_every_batch_length_and_number_of_kept_heads(bundle: Bundle, played: Played) -> None:
    build(bundle, "tensorrt", 4, 64)
    prefill, decode = played.config["profiles"]
    model = onnx.load(str(bundle.model_path))
    assert set(prefill) == set(decode) == {i.name for i in model.graph.input}
    assert prefill["input_ids"] == ((1, 1), (1, 64), (4, 64))
    assert decode["input_ids"] == ((1, 1), (4, 1), (4, 1))
    assert decode["output_positions"][2] == (4, 1)
    for layer, kept in enumerate(MODEL.kept):
        assert prefill[f"past_key.{layer}"] == ((1, kept, 1, 8), (1, kept, 64, 8), (4, 4, 64, 8))
        assert decode[f"past_value.{layer}"] == ((1, 4, 1, 4), (4, 4, 64, 4), (4, 4, 64, 4))


def test_a_long_prompt_is_fed_in_chunks_that_cover_the_probe() -> None:
    manifest = TinyModel(probe=600).manifest()
    prefill, _ = profiles(manifest, 2, 4096)
    assert prefill["input_ids"].most == (2, 600)


def test_the_record_says_what_was_built_with_what(bundle: Bundle, played: Played, library: Path) -> None:
    record = build(bundle, "tensorrt", 4, 64)
    assert Bundle.load(bundle.path).manifest.engines["tensorrt"] == record
    assert (record.runtime_version, record.gpu_architecture, record.plugin_version) == (
        "11.4.0.106",
        "sm_90",
        "1",
    )
    assert {
        "engines/tensorrt/engine.plan",
        "engines/tensorrt/kernels/index.json",
        NETWORK_FILE,
    } <= record.files.keys()
    assert record.settings["gpu"] == "Played GPU"
    assert record.settings["driver"] == "999.1"
    assert len(str(record.settings["plugin_sha256"])) == len(str(record.settings["kernels_sha256"])) == 64
    words = shlex.split(str(record.settings["trtexec"]))
    assert words[:3] == ["trtexec", f"--onnx={NETWORK_FILE}", f"--dynamicPlugins={library}"]
    assert any(w.startswith("--maxShapes=input_ids:4x64,lengths:4,") for w in words)
    assert "--profile=1" in words
    # polygraphy turns TF32 off, and trtexec would run what it built on caches of its own.
    assert {"--noTF32", "--skipInference", "--stronglyTyped"} <= set(words)
    assert not list(bundle.path.glob(".*"))


def test_the_engine_runs_through_the_runner(bundle: Bundle, played: Played) -> None:
    build(bundle, "tensorrt", 4, 64)
    runner = ce.load(bundle.path, backend="tensorrt")
    prompt = [7, 8, 20, 21, 6, 30]
    assert runner.generate([prompt], 8, ignore_eos=True)[0].token_ids == MODEL.greedy(prompt, 8)
    np.testing.assert_array_equal(runner.head_maps[:, 0, :].shape, (2, 4))


def test_builder_memory_becomes_a_pool_limit(bundle: Bundle, played: Played) -> None:
    record = engine_module.build_tensorrt(bundle, 4, 64, builder_memory=512 << 20)
    assert played.config["memory_pool_limits"] == {"workspace": 512 << 20}
    assert "--memPoolSize=workspace:512M" in str(record.settings["trtexec"])


@pytest.mark.parametrize("alias", [None, True, False])
def test_one_flag_tells_the_builder_of_caches_in_place(
    bundle: Bundle, played: Played, alias: bool | None
) -> None:
    record = build(bundle, "tensorrt", 4, 64, alias_caches=alias)
    on = alias is not False
    assert played.features == ({"aliased": True} if on else {})
    assert record.settings["alias_caches"] is on
    assert ("--preview=+aliasedPluginIO1003" in shlex.split(str(record.settings["trtexec"]))) is on


def test_integer_weights_lie_beside_the_engine(bundle: Bundle, played: Played) -> None:
    model = onnx.load(str(bundle.model_path))
    numbers = np.arange(16 * 16, dtype=np.uint8).reshape(16, 1, 16)
    constants = {"hidden": np.ones((2, 32), np.float32), "packed": numbers, "scales": np.ones((16, 1), "f")}
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    sizes = {"K": 32, "N": 16, "bits": 4, "block_size": 32}
    node = onnx.helper.make_node("MatMulNBits", constants, ["product"], domain="com.microsoft", **sizes)
    model.graph.node.append(node)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(bundle.model_path))
    record = build(bundle, "tensorrt", 4, 64)
    assert "engines/tensorrt/integer_weights.data" in record.files
    saved = onnx.load(str(bundle.path / NETWORK_FILE))
    assert played.parsed is not None
    for parsed in (played.parsed, saved):
        stored = next(tensor for tensor in parsed.graph.initializer if tensor.name == "packed_int4")
        assert stored.raw_data == (numbers ^ 0x88).tobytes()
        assert "packed" not in {tensor.name for tensor in parsed.graph.initializer}


def test_without_native_code_the_function_body_is_built(
    bundle: Bundle, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine_module, session_module):
        monkeypatch.setattr(module, "require_plugin", environment.require_plugin)
    monkeypatch.setenv(SWITCH, "0")
    record = build(bundle, "tensorrt", 4, 64)
    assert played.parsed is not None
    assert len(played.parsed.functions) == 1
    assert record.plugin_version is None
    assert not played.features
    assert "--preview" not in str(record.settings["trtexec"])
    assert set(record.files) == {"engines/tensorrt/engine.plan", NETWORK_FILE}
    monkeypatch.delenv(SWITCH)
    runner = ce.load(bundle.path, backend="tensorrt")
    assert runner.generate([[5, 9]], 4, ignore_eos=True)[0].token_ids == MODEL.greedy([5, 9], 4)


def test_an_engine_for_another_gpu_or_version_says_to_build_again(
    bundle: Bundle, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, "tensorrt", 4, 64)
    monkeypatch.setattr(session_module, "require_gpu", lambda: Gpu("Other", 100, ""))
    with pytest.raises(
        ChaiError, match="built for GPU architecture sm_90 and this is sm_100; run `chai-export build"
    ):
        ce.load(bundle.path, backend="tensorrt")
    monkeypatch.setattr(session_module, "require_gpu", lambda: GPU)
    played.tensorrt.__version__ = "11.5.0.1"
    with pytest.raises(ChaiError, match=r"built for TensorRT version 11\.4\.0\.106 and this is 11\.5\.0\.1"):
        ce.load(bundle.path, backend="tensorrt")


def test_a_bundle_without_engine_says_to_build_one(bundle: Bundle, played: Played) -> None:
    with pytest.raises(ChaiError, match="has no tensorrt engine; run `chai-export build"):
        ce.load(bundle.path, backend="tensorrt")


PARSED_OPERATORS = """
Abs Add And Cast CastLike Concat Constant Div Equal Expand Gather GatherElements GatherND Greater
GreaterOrEqual Identity If Less LessOrEqual Loop MatMul Max Min Mul Neg Range ReduceMax ReduceMin ReduceSum
Reshape Round Shape Slice Softmax Sqrt Squeeze Sub Transpose Unsqueeze Where
"""
"""Documented as supported, for the types in use, by TensorRT's ONNX parser (operators.md of release 10.1)."""


def operators(nodes: Any) -> set[str]:
    found = set()
    for node in nodes:
        found.add(node.op_type)
        for attribute in node.attribute:
            found |= operators(attribute.g.node)
    return found


def test_the_portable_network_uses_documented_operators_only(bundle: Bundle) -> None:
    function = portable_network(bundle).functions[0]
    assert operators(function.node) - {"CumSum"} <= set(PARSED_OPERATORS.split())
    produced = {name: node for node in function.node for name in node.output}
    sums = [node for node in function.node if node.op_type == "CumSum"]
    assert sums
    for node in sums:
        cast = produced[node.input[0]]
        assert (cast.op_type, attributes(cast)) == ("Cast", {"to": onnx.TensorProto.FLOAT})


def test_the_portable_network_computes_the_same(bundle: Bundle, tmp_path: Path) -> None:
    feeds = {
        "input_ids": np.arange(12, dtype=np.int64).reshape(2, 6),
        "lengths": np.array([6, 4], np.int32),
        "past_lengths": np.zeros(2, np.int32),
        "output_positions": np.array([[5], [3]]),
        "head_map": np.zeros((2, 2, 4), np.int32),
    }
    for layer, kept in enumerate(MODEL.kept):
        feeds[f"past_key.{layer}"] = np.zeros((2, kept, 8, 8), np.float32)
        feeds[f"past_value.{layer}"] = np.zeros((2, 4, 8, 4), np.float32)
    rewritten = tmp_path / "portable.onnx"
    onnx.save(portable_network(bundle), rewritten)
    results = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
        for path in (bundle.model_path, rewritten)
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
