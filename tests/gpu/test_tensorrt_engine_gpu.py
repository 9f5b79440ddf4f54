"""Whole TensorRT engines on a GPU: built, run by the Python session, compared with the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import chai_export as ce
from chai_export.engines.build import build
from tests.helpers.tensorrt_probe import LIBRARY
from tests.helpers.tiny_graph import TinyModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not LIBRARY.is_file(), reason="libchai_tensorrt.so was not built: set TensorRT_ROOT"),
]
PROMPTS = [[5, 9], [7, 8, 20, 21, 6, 30], list(range(4, 33))]
TOLERANCE = {"float32": 1e-4, "float16": 5e-2}
MODELS = {
    f"{dtype} {bits}": TinyModel(
        positions=300, head_dim=16, value_dim=16, dtype=dtype, bits=bits, scale_group=16
    )
    for dtype in TOLERANCE
    for bits in ((0, 0), (8, 4), ((4, 16), (0, 8)))
}


@pytest.fixture(scope="module", params=list(MODELS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, Path]:
    pytest.importorskip("tensorrt", reason="TensorRT is not installed: pip install 'chai-export[tensorrt]'")
    model = MODELS[request.param]
    bundle = model.write(tmp_path_factory.mktemp("bundles") / "bundle")
    build(bundle, "tensorrt", max_batch=3, max_seq=256)
    return model, bundle.path


@pytest.mark.parametrize("heads", ["chai", "all"])
def test_logits_and_head_maps_are_those_of_the_reference(built: tuple[TinyModel, Path], heads: str) -> None:
    model, path = built
    runner = ce.load(path, backend="tensorrt", heads=heads)
    for prompt in PROMPTS:
        logits, maps = model.reference(prompt, heads)
        np.testing.assert_allclose(runner.logits(prompt), logits, atol=TOLERANCE[model.dtype])
        if model.dtype == "float32":
            np.testing.assert_array_equal(runner.head_maps, maps)


@pytest.mark.parametrize("heads", ["chai", "all"])
def test_a_batch_generates_what_each_prompt_generates_alone(
    built: tuple[TinyModel, Path], heads: str
) -> None:
    model, path = built
    if model.dtype != "float32":
        pytest.skip("greedy choices between near ties may differ in float16")
    runner = ce.load(path, backend="tensorrt", heads=heads)
    results = runner.generate(PROMPTS, max_new_tokens=150, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == model.greedy(prompt, 150, heads)
