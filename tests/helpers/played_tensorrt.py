"""A TensorRT and a polygraphy for tests that build engines: nothing is built, everything is remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.engines import tensorrt as engine_module
from chai_export.kernels.spec import Spec
from chai_export.op.schema import DOMAIN, OP_TYPE
from chai_export.runtime import tensorrt_session as session_module
from chai_export.runtime.tensorrt_environment import Gpu
from tests.helpers.fake_tensorrt import TENSORRT, FakeEngine, HostDevice
from tests.helpers.tiny_graph import TinyModel

MODEL = TinyModel(positions=96)
GPU = Gpu("Played GPU", 90, "999.1")


class Played:
    """A TensorRT and a polygraphy that build nothing, and remember what they are given."""

    def __init__(self, bundle: Bundle) -> None:
        self.parsed: onnx.ModelProto | None = None
        self.config: dict[str, Any] = {}
        self.fail: Callable[[], None] = lambda: None
        self.plugin_layers: int | None = None
        self.parse_errors: list[Any] = []
        self.unknown: set[str] = set()
        self.features: dict[str, bool] = {}
        self.builder = SimpleNamespace(error_recorder=None)
        self.network = SimpleNamespace()
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
            OnnxParser=lambda network, logger: PlayedParser(self),
            PreviewFeature=SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliased"),
            init_libnvinfer_plugins=lambda logger, namespace: True,
            **vars(TENSORRT),
        )
        self.polygraphy = SimpleNamespace(
            create_network=self._create_network,
            get_trt_logger=lambda: "a logger",
            CreateConfig=lambda **given: self.config.update(given),
            PostprocessConfig=lambda config, func: func(self.builder, self.network, self),
            Profile=PlayedProfile,
            engine_bytes_from_network=self._build,
        )

    def _create_network(self, strongly_typed: bool) -> Any:
        assert strongly_typed
        return self.builder, self.network

    def set_preview_feature(self, feature: str, on: bool) -> None:
        self.features[feature] = on

    def parse(self, path: str) -> None:
        self.path = path
        self.parsed = model = onnx.load(path)
        kinds = [
            "plugin" if n.op_type == OP_TYPE and not model.functions else "other" for n in model.graph.node
        ]
        if self.plugin_layers is not None:
            kinds = ["plugin"] * self.plugin_layers
        self.network.num_layers = len(kinds)
        self.network.get_layer = lambda i: SimpleNamespace(type=kinds[i])
        self.network.num_inputs = 1
        self.network.get_input = lambda i: SimpleNamespace(name="input_ids", is_shape_tensor=False)

    def _build(self, network: Any, config: Any, save_timing_cache: str) -> bytes:
        self.fail()
        return b"a plan"


class PlayedParser:
    """Takes every operator but those of ``unknown``, and every graph unless there are ``parse_errors``."""

    def __init__(self, played: Played) -> None:
        self._played = played

    @property
    def num_errors(self) -> int:
        return len(self._played.parse_errors)

    def supports_operator(self, op_type: str) -> bool:
        return op_type not in self._played.unknown

    def parse_from_file(self, path: str) -> bool:
        self._played.parse(path)
        return not self._played.parse_errors

    def get_error(self, index: int) -> Any:
        return self._played.parse_errors[index]


class PlayedProfile(dict[str, Any]):
    def add(self, name: str, *shapes: tuple[int, ...]) -> None:
        self[name] = shapes


def make_played(bundle: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    """Put the play in the place of TensorRT, polygraphy, the GPU, the kernel compiler and the CUDA device."""

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
