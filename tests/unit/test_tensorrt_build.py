"""Building TensorRT engines: the network, the profiles, the record and each error, with TensorRT played."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.engines import tensorrt as engine_module
from chai_export.engines import tensorrt_layers as layers_module
from chai_export.engines.build import build
from chai_export.engines.doctor import diagnose
from chai_export.engines.tensorrt import NETWORK_FILE, place_kernels, spec_of
from chai_export.engines.tensorrt_layers import compare_layers
from chai_export.engines.tensorrt_network import portable_network, require_parsed
from chai_export.engines.tensorrt_profiles import profiles
from chai_export.errors import ChaiError, UsageError
from chai_export.kernels.spec import Spec
from chai_export.op.schema import DOMAIN, OP_TYPE
from chai_export.runtime import tensorrt_environment as environment
from chai_export.runtime import tensorrt_session as session_module
from chai_export.runtime.native import SWITCH
from chai_export.runtime.tensorrt_environment import Gpu
from tests.fake_tensorrt import FakeEngine, HostDevice
from tests.tiny_graph import TinyModel

polygraphy_exception = pytest.importorskip(
    "polygraphy.exception", reason="polygraphy is not installed: pip install 'chai-export[dev]'"
)
MODEL = TinyModel(positions=96)
GPU = Gpu("Played GPU", 90, "999.1")


class Played:
    """A TensorRT and a polygraphy that build nothing, and remember what they are given."""

    def __init__(self, bundle: Bundle) -> None:
        self.parsed: onnx.ModelProto | None = None
        self.config: dict[str, Any] = {}
        self.fail: Callable[[], None] = lambda: None
        self.plugin_layers: int | None = None
        self.builder = SimpleNamespace(error_recorder=None)
        base = type("Base", (), {"__init__": lambda self: None})
        engine = SimpleNamespace(deserialize_cuda_engine=lambda plan: FakeEngine(bundle, 4, 64))
        self.tensorrt = SimpleNamespace(
            __version__="11.4.0.106",
            IProgressMonitor=base,
            IErrorRecorder=base,
            ILogger=type("ILogger", (base,), {"WARNING": 2}),
            LayerType=SimpleNamespace(PLUGIN_V3="plugin"),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
            Runtime=lambda logger: engine,
        )
        self.polygraphy = SimpleNamespace(
            network_from_onnx_path=self._parse,
            CreateConfig=lambda **given: self.config.update(given),
            Profile=PlayedProfile,
            engine_bytes_from_network=self._build,
        )

    def _parse(self, path: str, strongly_typed: bool) -> Any:
        assert strongly_typed
        self.path = path
        self.parsed = model = onnx.load(path)
        kinds = [
            "plugin" if n.op_type == OP_TYPE and not model.functions else "other" for n in model.graph.node
        ]
        if self.plugin_layers is not None:
            kinds = ["plugin"] * self.plugin_layers
        network = SimpleNamespace(
            num_layers=len(kinds),
            get_layer=lambda i: SimpleNamespace(type=kinds[i]),
            num_inputs=1,
            get_input=lambda i: SimpleNamespace(name="input_ids", is_shape_tensor=False),
        )
        return self.builder, network, None

    def _build(self, network: Any, config: Any, save_timing_cache: str) -> bytes:
        self.fail()
        return b"a plan"


class PlayedProfile(dict[str, Any]):
    def add(self, name: str, *shapes: tuple[int, ...]) -> None:
        self[name] = shapes


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
    played = Played(bundle)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (engine_module, session_module):
        monkeypatch.setattr(module, "import_tensorrt", lambda: played.tensorrt)
        monkeypatch.setattr(module, "require_gpu", lambda: GPU)
        monkeypatch.setattr(module, "require_plugin", lambda tensorrt: library)
    monkeypatch.setattr(engine_module, "import_polygraphy", lambda: played.polygraphy)
    monkeypatch.setattr(engine_module, "compile_kernels", write_kernels)
    monkeypatch.setattr(session_module, "CudaDevice", HostDevice)
    return played


def write_kernels(spec: Spec, architecture: int, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "one.cubin").write_bytes(b"code")
    index = {"architecture": architecture, "spec": vars(spec), "launches": [{"file": "one.cubin"}]}
    (directory / "index.json").write_text(json.dumps(index))
    return directory / "index.json"


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def op_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, OP_TYPE)]


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
    manifest = SimpleNamespace(
        num_layers=1,
        num_query_heads=2,
        num_kv_heads=2,
        head_dim=4,
        value_head_dim=4,
        kept_heads=[1],
        probe_tokens=600,
    )
    prefill, _ = profiles(manifest, 2, 4096)  # type: ignore[arg-type]
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


def raiser(message: str) -> Callable[[], None]:
    def fail() -> None:
        raise polygraphy_exception.PolygraphyException(message)

    return fail


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: setattr(p, "fail", raiser("Invalid Engine.")),
            "could not build the engine .Invalid Engine",
        ),
        (
            lambda p: setattr(
                p, "fail", lambda: raiser("x")() if report(p, "Requested 9 GB: out of memory") else None
            ),
            "GPU memory ran out while building .Requested 9 GB.*lower --max-batch",
        ),
        (lambda p: setattr(p, "plugin_layers", 1), "parsed 1 plugin layers for 2 attentions"),
        (
            lambda p: setattr(
                p.polygraphy, "network_from_onnx_path", lambda *a, **k: raiser("No\nimporter for Foo")()
            ),
            r"does not take the graph \(No importer for Foo\); use a newer TensorRT",
        ),
    ],
)
def test_a_failed_build_is_one_line_and_leaves_nothing(
    bundle: Bundle, played: Played, spoil: Callable[[Played], None], message: str
) -> None:
    before = sorted(bundle.path.rglob("*"))
    spoil(played)
    with pytest.raises(ChaiError, match=message) as caught:
        build(bundle, "tensorrt", 4, 64)
    assert "\n" not in str(caught.value)
    assert sorted(bundle.path.rglob("*")) == before
    assert "tensorrt" not in Bundle.load(bundle.path).manifest.engines


def report(played: Played, message: str) -> bool:
    played.builder.error_recorder.report_error(0, message)
    return True


def test_kernels_for_another_gpu_or_model_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    spec = spec_of(bundle)
    target = tmp_path / "target"
    write_kernels(spec, 80, tmp_path / "old")
    with pytest.raises(ChaiError, match="are for sm_80 and this GPU is sm_90; compile them for this machine"):
        place_kernels(spec, GPU, tmp_path / "old", target)
    write_kernels(Spec("float16", 4, 2, 16, 16), 90, tmp_path / "other")
    with pytest.raises(ChaiError, match="and the model needs"):
        place_kernels(spec, GPU, tmp_path / "other", target)
    with pytest.raises(ChaiError, match="holds no kernels that can be read"):
        place_kernels(spec, GPU, tmp_path / "nowhere", target)
    write_kernels(spec, 90, tmp_path / "good")
    assert place_kernels(spec, GPU, tmp_path / "good", target).parent == target
    assert (target / "one.cubin").read_bytes() == b"code"


def test_no_tensorrt_no_polygraphy_and_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(environment.importlib, "import_module", missing)
    with pytest.raises(
        ChaiError, match=r"TensorRT cannot be imported .*; pip install 'chai-export\[tensorrt\]'"
    ):
        environment.import_tensorrt()
    with pytest.raises(ChaiError, match="polygraphy cannot be imported"):
        environment.import_polygraphy()
    old = SimpleNamespace(__version__="10.2.0")
    monkeypatch.setattr(environment.importlib, "import_module", lambda name: old)
    with pytest.raises(ChaiError, match=r"TensorRT is 10.2.0 and 10.3 or newer is needed"):
        environment.import_tensorrt()


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ChaiError, match="is a build without CUDA"):
        environment.require_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ChaiError, match="no CUDA GPU or its driver is not installed"):
        environment.require_gpu()


def test_no_plugin_library_and_one_for_another_version(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = SimpleNamespace(get_creator=lambda *names: None)
    tensorrt = SimpleNamespace(__version__="11.4.0", get_plugin_registry=lambda: registry)
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(environment, "find_library", lambda name: None)
    with pytest.raises(ChaiError, match="was not built; set TensorRT_ROOT to the headers of TensorRT 11"):
        environment.require_plugin(tensorrt)
    monkeypatch.setattr(environment, "find_library", lambda name: library)
    with pytest.raises(ChaiError, match="does not load"):
        environment.require_plugin(tensorrt)
    loaded = SimpleNamespace(chai_tensorrt_major=lambda: 10)
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda path: loaded)
    with pytest.raises(ChaiError, match=r"compiled for TensorRT 10 and 11\.4\.0 is installed"):
        environment.require_plugin(tensorrt)
    loaded.chai_tensorrt_major = lambda: 11
    with pytest.raises(ChaiError, match="loads but registers no plugin"):
        environment.require_plugin(tensorrt)
    registry.get_creator = lambda *names: object()
    assert environment.require_plugin(tensorrt) == library


def test_options_of_tensorrt_are_refused_for_another_backend(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="--builder-memory is for --backend tensorrt"):
        build(bundle, "onnxruntime", builder_memory=1 << 30)
    with pytest.raises(UsageError, match="--builder-memory is 0; give 1 or more"):
        build(bundle, "tensorrt", builder_memory=0)


def test_doctor_says_what_tensorrt_lacks_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ChaiError("TensorRT cannot be imported (none); pip install it")

    monkeypatch.setattr(environment, "import_tensorrt", missing)
    finding = next(f for f in diagnose() if f.name == "tensorrt, plugin")
    assert not finding.works
    assert (finding.found, finding.fix) == ("TensorRT cannot be imported (none)", "pip install it")


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


def play_runner(played: Played, bundle: Bundle, error: float) -> None:
    """An engine that computes what the portable graph does, but for ``error`` in the second layer."""

    class Runner:
        def __init__(self, path: str) -> None:
            model = portable_network(bundle)
            model.graph.output.extend(onnx.load(path).graph.output[len(model.graph.output) :])
            self.session = onnxruntime.InferenceSession(model.SerializeToString())
            self.watched = [o.name for o in self.session.get_outputs()]

        def __enter__(self) -> Runner:
            return self

        def __exit__(self, *error: object) -> None:
            """Nothing is held."""

        def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
            results = dict(zip(self.watched, self.session.run(None, feeds), strict=True))
            results[self.watched[-1]] = results[self.watched[-1]] + np.float32(error)
            return results

    played.polygraphy.engine_from_network = lambda network, config: played.path
    played.polygraphy.TrtRunner = Runner


def test_layers_are_compared_one_by_one(
    bundle: Bundle, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("import_tensorrt", "require_gpu", "require_plugin", "import_polygraphy"):
        monkeypatch.setattr(layers_module, name, getattr(engine_module, name))
    with pytest.raises(ChaiError, match="has no tensorrt engine"):
        compare_layers(bundle)
    build(bundle, "tensorrt", 4, 64)
    before = sorted(bundle.path.rglob("*"))
    for error in (0.0, 0.5):
        play_runner(played, bundle, error)
        found = compare_layers(Bundle.load(bundle.path), tokens=9)
        assert [layer.index for layer in found] == [0, 1]
        assert [layer.max_abs_diff for layer in found] == pytest.approx([0.0, error])
        assert all(layer.max_abs > 0.01 for layer in found)
    assert sorted(bundle.path.rglob("*")) == before


def test_an_operator_that_the_parser_does_not_take_yet(bundle: Bundle, played: Played) -> None:
    model = onnx.load(str(bundle.model_path))
    model.graph.node.append(onnx.helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"]))
    onnx.save(model, str(bundle.model_path))
    require_parsed(bundle, (10, 15))
    with pytest.raises(ChaiError, match=r"uses RotaryEmbedding, .* from 10\.15 on and this is 10\.3"):
        require_parsed(bundle, (10, 3))
