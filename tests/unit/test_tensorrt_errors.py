"""What can go wrong in building a TensorRT engine, each with one line and its fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.engines import tensorrt as engine_module
from chai_export.engines.build import build
from chai_export.engines.doctor import diagnose
from chai_export.engines.tensorrt import place_kernels
from chai_export.engines.tensorrt_network import specs
from chai_export.errors import ChaiError, UsageError
from chai_export.kernels.spec import Spec
from chai_export.runtime import tensorrt_environment as environment
from chai_export.runtime.native import SWITCH
from tests.helpers.played_tensorrt import GPU, MODEL, Played, make_played, write_kernels
from tests.helpers.tiny_graph import TinyModel

polygraphy_exception = pytest.importorskip(
    "polygraphy.exception", reason="polygraphy is not installed: pip install 'chai-export[dev]'"
)


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
        (
            lambda p: setattr(
                p,
                "fail",
                lambda: (
                    [report(p, m) for m in ("a tactic was skipped", "no\nkernel", "layer 3 has no tactic")]
                    and raiser("Invalid Engine.")()
                ),
            ),
            r"could not build the engine \(no kernel; layer 3 has no tactic\)",
        ),
        (lambda p: setattr(p, "plugin_layers", 1), "parsed 1 plugin layers for 2 attentions"),
        (
            lambda p: setattr(
                p, "parse_errors", [parser_error("no plugin", ""), parser_error("No\nimporter", "Foo")]
            ),
            r"ONNX parser does not take Foo \(a node\): No importer; export the model with",
        ),
        (
            lambda p: setattr(p, "parse_errors", [parser_error("axis 1", "RMSNormalization")]),
            r"RMSNormalization \(a node\): axis 1; pip install --upgrade tensorrt, or rewrite .* opset 22",
        ),
        (
            lambda p: setattr(p, "parse_errors", [parser_error("not a model", "")]),
            r"does not take the graph: not a model; export the model with",
        ),
        (
            lambda p: setattr(
                p,
                "fail",
                lambda: (
                    report(p, "Aliased I/O used by plugin but kALIASED_PLUGIN_IO_10_03 is off")
                    and raiser("Invalid Engine.")()
                ),
            ),
            "Aliased I/O used by plugin .*; leave --no-alias-caches out",
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


def parser_error(text: str, operator: str) -> Any:
    return SimpleNamespace(desc=lambda: text, node_operator=lambda: operator, node_name=lambda: "a node")


def report(played: Played, message: str) -> bool:
    played.builder.error_recorder.report_error(0, message)
    return True


def test_kernels_for_another_gpu_or_model_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    wanted = specs(bundle)
    (spec,) = wanted.values()
    target = tmp_path / "target"
    write_kernels(spec, 80, tmp_path / "old")
    with pytest.raises(ChaiError, match="are for sm_80 and this GPU is sm_90; compile them for this machine"):
        place_kernels(wanted, GPU, tmp_path / "old", target)
    write_kernels(Spec(4, 2, 16, 16, "float16"), 90, tmp_path / "other")
    with pytest.raises(ChaiError, match="and the model needs"):
        place_kernels(wanted, GPU, tmp_path / "other", target)
    with pytest.raises(ChaiError, match="holds no kernels"):
        place_kernels(wanted, GPU, tmp_path / "nowhere", target)
    write_kernels(spec, 90, tmp_path / "good")
    place_kernels(wanted, GPU, tmp_path / "good", target)
    assert (target / "k0v0" / "one.cubin").read_bytes() == b"code"


def test_kernels_of_several_forms_lie_in_folders_of_their_names(tmp_path: Path) -> None:
    wanted = specs(TinyModel(bits=((8, 4), (4, 4))).write(tmp_path / "bundle"))
    for form, spec in wanted.items():
        write_kernels(spec, 90, tmp_path / "given" / form)
    place_kernels(wanted, GPU, tmp_path / "given", tmp_path / "target")
    assert {path.parent.name for path in (tmp_path / "target").glob("*/index.json")} == {"k8v4", "k4v4"}
    with pytest.raises(ChaiError, match=r"k8v4 are for .* and the model needs"):
        place_kernels({"k4v4": wanted["k4v4"]}, GPU, tmp_path / "given" / "k8v4", tmp_path / "target")


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
    registry = SimpleNamespace(get_creator=lambda *names: None, load_library=lambda path: None)
    tensorrt = SimpleNamespace(__version__="11.4.0", get_plugin_registry=lambda: registry)
    monkeypatch.setenv(SWITCH, "0")
    with pytest.raises(ChaiError, match=f"{SWITCH}=0 leaves native code out.*unset it, or use --backend"):
        environment.require_plugin(tensorrt)
    monkeypatch.delenv(SWITCH)
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
    registry.load_library = lambda path: object() if path == str(library) else None
    assert environment.require_plugin(tensorrt) == library
    registry.load_library = lambda path: pytest.fail("it is registered")
    registry.get_creator = lambda *names: object()
    assert environment.require_plugin(tensorrt) == library


def test_options_of_tensorrt_are_refused_for_another_backend(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="--builder-memory is for --backend tensorrt"):
        build(bundle, "onnxruntime", builder_memory=1 << 30)
    with pytest.raises(UsageError, match="--alias-caches is for --backend tensorrt"):
        build(bundle, "onnxruntime", alias_caches=False)
    with pytest.raises(UsageError, match="--builder-memory is 0; give 1 or more"):
        build(bundle, "tensorrt", builder_memory=0)


def test_doctor_says_what_tensorrt_lacks_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ChaiError("TensorRT cannot be imported (none); pip install it")

    monkeypatch.setattr(environment, "import_tensorrt", missing)
    finding = next(f for f in diagnose() if f.name == "tensorrt, plugin")
    assert not finding.works
    assert (finding.found, finding.fix) == ("TensorRT cannot be imported (none)", "pip install it")


def with_node(bundle: Bundle, op_type: str, inputs: list[str], domain: str = "") -> None:
    model = onnx.load(str(bundle.model_path))
    model.graph.node.append(onnx.helper.make_node(op_type, inputs, [f"y_{op_type}"], domain=domain))
    onnx.save(model, str(bundle.model_path))


@pytest.fixture
def no_kernels(played: Played, monkeypatch: pytest.MonkeyPatch) -> Played:
    """Kernels take minutes: what can be known before is said before."""
    monkeypatch.setattr(engine_module, "compile_kernels", lambda *given: pytest.fail("too late"))
    return played


def test_an_operator_that_the_parser_does_not_take_yet(bundle: Bundle, no_kernels: Played) -> None:
    with_node(bundle, "RotaryEmbedding", ["x", "cos", "sin"])
    no_kernels.tensorrt.__version__ = "10.3.0"
    with pytest.raises(ChaiError, match=r"uses RotaryEmbedding, .* from 10\.15 on and this is 10\.3"):
        build(bundle, "tensorrt", 4, 64)


def test_operators_that_no_parser_takes_are_all_named(bundle: Bundle, no_kernels: Played) -> None:
    with_node(bundle, "QLinearMatMul", ["x", "w"])
    with_node(bundle, "ConvInteger", ["x"])
    no_kernels.unknown = {"ConvInteger", "QLinearMatMul"}
    with pytest.raises(
        ChaiError,
        match=r"parser of TensorRT 11\.4\.0\.106 does not take ConvInteger, QLinearMatMul; export",
    ):
        build(bundle, "tensorrt", 4, 64)


def test_operators_of_another_domain_are_all_named(bundle: Bundle, no_kernels: Played) -> None:
    with_node(bundle, "FusedMatMul", ["x", "w"], "com.microsoft")
    with_node(bundle, "FusedMatMul", ["x", "w"], "com.microsoft")
    with_node(bundle, "Attention", ["x", "w", "b"], "com.microsoft")  # ONNX has one too
    with pytest.raises(
        ChaiError,
        match=r"does not have: com\.microsoft\.Attention \(1\), com\.microsoft\.FusedMatMul \(2\); "
        r"export the model with `chai-export export`, or use --backend onnxruntime",
    ):
        build(bundle, "tensorrt", 4, 64)
    assert not (bundle.path / "engines").exists()
