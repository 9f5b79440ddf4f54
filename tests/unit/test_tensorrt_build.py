"""Building TensorRT engines: the network, the profiles and the record, with TensorRT played."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.engines import proof
from chai_export.engines import tensorrt as engine_module
from chai_export.engines.build import build
from chai_export.engines.tensorrt import NETWORK_FILE
from chai_export.engines.tensorrt_network import specs
from chai_export.engines.tensorrt_profiles import profiles
from chai_export.errors import ChaiError
from chai_export.op.attributes import Attributes
from chai_export.op.schema import signature
from chai_export.runtime import tensorrt_session as session_module
from chai_export.runtime.tensorrt_environment import Gpu
from tests.helpers.fake_tensorrt import FakeEngine, HostDevice
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
            assert (given["plugin_version"], given["plugin_namespace"]) == (b"2", b"chai")
            assert Attributes().as_onnx().keys() <= given.keys()
            assert node.overload == ""
    assert attributes(op_nodes(saved)[0])["kernel_directory"] == b"engines/tensorrt/kernels/k0v0"
    assert attributes(op_nodes(played.parsed)[0])["kernel_directory"].startswith(b"/")


def test_profiles_span_every_batch_length_and_number_of_kept_heads(bundle: Bundle, played: Played) -> None:
    build(bundle, "tensorrt", 4, 64)
    prefill, decode = played.config["profiles"]
    model = onnx.load(str(bundle.model_path))
    assert set(prefill) == set(decode) == {i.name for i in model.graph.input}
    assert prefill["input_ids"] == ((1, 1), (1, 64), (4, 64))
    assert decode["input_ids"] == ((1, 1), (4, 1), (4, 1))
    assert decode["output_positions"][2] == (4, 1)
    for profile in (prefill, decode):
        rows = profile["input_ids"][1][0]
        # 64 tokens take a page; a pool has those of every row.
        assert profile["page_table"] == ((1, 1), (rows, 1), (4, 1))
        for layer, kept in enumerate(MODEL.kept):
            assert profile[f"past_key.{layer}"] == ((1, kept, 128, 8), (4, kept, 128, 8), (4, 4, 128, 8))
            assert profile[f"past_value.{layer}"] == ((1, 4, 128, 4), (4, 4, 128, 4), (4, 4, 128, 4))


def test_rows_and_pools_grow_by_pages() -> None:
    prefill, decode = profiles(TinyModel(bits=(8, 4)).manifest(), 3, 1000)
    assert prefill["page_table"].most == decode["page_table"].most == (3, 8)
    assert prefill["past_value.0"].most == (24, 4, 128, 2)
    assert prefill["past_value_scales.0"].most == (24, 4, 128, 2)


def test_layers_that_store_differently_have_kernels_and_inputs_of_their_own(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = TinyModel(kept=(2, 3, 1), bits=((4, 16), (0, 8), (4, 16)))
    bundle = model.write(tmp_path / "mixed")
    played = make_played(bundle, library, monkeypatch, tmp_path)
    record = build(bundle, "tensorrt", 4, 64)
    for form, key_bits, value_bits in (("k4v16", 4, 16), ("k0v8", 0, 8)):
        index = json.loads((bundle.path / f"engines/tensorrt/kernels/{form}/index.json").read_text())
        assert (index["spec"]["key_bits"], index["spec"]["value_bits"]) == (key_bits, value_bits)
        assert index["spec"]["group_size"] == model.scale_group
    assert sum(name.endswith("index.json") for name in record.files) == 2
    assert played.parsed is not None
    nodes = op_nodes(played.parsed)
    folders = [attributes(node)["kernel_directory"].rpartition(b"/")[2] for node in nodes]
    assert folders == [b"k4v16", b"k0v8", b"k4v16"]
    # A layer of TensorRT has no absent inputs.
    assert all(all(node.input) and all(node.output) for node in nodes)
    assert [name for name in nodes[0].input if "past" in name][:3] == [
        "past_key.0",
        "past_value.0",
        "past_key_scales.0",
    ]
    assert "past_value_scales.1" in nodes[1].input
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in (*played.parsed.graph.input, *played.parsed.graph.output)
    }
    # TensorRT hands a plugin bytes as INT8 only.
    assert types["past_key.0"] == types["present_key.0"] == onnx.TensorProto.INT8
    assert types["past_value.0"] == onnx.TensorProto.FLOAT16
    runner = ce.load(bundle.path, backend="tensorrt")
    prompt = [7, 8, 20, 21, 6, 30]
    assert runner.generate([prompt], 8, ignore_eos=True)[0].token_ids == model.greedy(prompt, 8)


def test_terms_of_the_scores_make_a_form_of_their_own(bundle: Bundle) -> None:
    model = onnx.load(str(bundle.model_path))
    node = op_nodes(model)[0]
    next(a for a in node.attribute if a.name == "softcap").f = 30.0
    names = signature().input_names
    node.input.extend([""] * (len(names) - len(node.input)))
    node.input[names.index("alibi_slopes")] = "slopes"
    onnx.save(model, str(bundle.model_path))
    found = specs(bundle)
    assert list(found) == ["k0v0_slopes_softcap", "k0v0"]
    first = found["k0v0_slopes_softcap"]
    assert (first.slopes, first.softcap, first.sinks) == (True, True, False)


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
        "2",
    )
    assert {
        "engines/tensorrt/engine.plan",
        "engines/tensorrt/kernels/k0v0/index.json",
        NETWORK_FILE,
    } <= record.files.keys()
    assert record.settings["gpu"] == "Played GPU"
    assert record.settings["driver"] == "999.1"
    assert len(str(record.settings["plugin_sha256"])) == 64
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


class Wrong(FakeEngine):
    """Its logits of single tokens are those of another token: what a stale cache or a wrong graph does."""

    def __init__(self, bundle: Bundle, from_call: int) -> None:
        super().__init__(bundle, 4, 64)
        real = self.session.run

        def run(names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            if len(self.calls) >= from_call:
                feeds = {**feeds, "input_ids": (feeds["input_ids"] + 1) % MODEL.vocab}
            return real(names, feeds)

        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.session = SimpleNamespace(run=run, get_inputs=lambda: inputs, get_outputs=lambda: outputs)


@pytest.mark.parametrize(
    ("from_call", "heads", "step"),
    # The largest batch, then for either heads a prompt and four decode steps.
    [
        (1, "chai", "a prompt"),
        (4, "chai", "decode step 3"),
        (6, "all", "a prompt"),
        (10, "all", "decode step 4"),
    ],
)
def test_an_engine_that_computes_something_else_is_not_kept(
    bundle: Bundle, played: Played, from_call: int, heads: str, step: str
) -> None:
    played.tensorrt.Runtime = lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda plan: Wrong(bundle, from_call)
    )
    with pytest.raises(ChaiError, match=f"ONNX Runtime does: with {heads} heads logits of {step} differ"):
        build(bundle, "tensorrt", 4, 64)
    assert not (bundle.path / "engines").exists()
    assert not Bundle.load(bundle.path).manifest.engines


def test_the_proof_replays_a_graph_and_leaves_out_what_onnxruntime_cannot(
    bundle: Bundle, played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices: list[HostDevice] = []

    def device() -> HostDevice:
        devices.append(HostDevice())
        return devices[-1]

    monkeypatch.setattr(session_module, "CudaDevice", device)
    build(bundle, "tensorrt", 4, 64)
    # Of each session: the first decode step as it is, then three of one graph.
    assert [(each.captured, each.replayed) for each in devices] == [(1, 3), (1, 3)]
    monkeypatch.setattr(proof, "available_memory", lambda: 1)
    build(bundle, "tensorrt", 4, 64)
    assert "the engine is not compared with ONNX Runtime: its weights do not fit" in capsys.readouterr().err
    assert len(devices) == 3
