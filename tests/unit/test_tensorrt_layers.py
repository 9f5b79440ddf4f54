"""TensorRT against ONNX Runtime, attention by attention, with TensorRT played."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.engines import tensorrt as engine_module
from chai_export.engines import tensorrt_layers as layers_module
from chai_export.engines.build import build
from chai_export.engines.tensorrt_layers import compare_layers
from chai_export.errors import ChaiError
from tests.helpers.fake_tensorrt import NUMPY_TYPES
from tests.helpers.played_tensorrt import Played, make_played
from tests.helpers.tiny_graph import TinyModel

pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'chai-export[dev]'")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return TinyModel(bits=((4, 8), (0, 16))).write(tmp_path / "bundle")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libchai_tensorrt.so"
    path.write_bytes(b"a library")
    return path


@pytest.fixture
def played(bundle: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    return make_played(bundle, library, monkeypatch, tmp_path)


def play_runner(played: Played, bundle: Bundle, error: float) -> None:
    """An engine that computes what the graph does, but for ``error`` in the second layer."""

    class Runner:
        def __init__(self, path: str) -> None:
            model = onnx.load(str(bundle.model_path))
            model.graph.output.extend(onnx.load(path).graph.output[len(model.graph.output) :])
            self.session = onnxruntime.InferenceSession(model.SerializeToString())
            self.watched = [o.name for o in self.session.get_outputs()]

        def __enter__(self) -> Runner:
            return self

        def __exit__(self, *error: object) -> None:
            """Nothing is held."""

        def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
            assert feeds["past_key.0"].dtype == np.int8  # as TensorRT has it
            types = {node.name: NUMPY_TYPES[node.type] for node in self.session.get_inputs()}
            feeds = {name: array.view(types[name]) for name, array in feeds.items()}
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
