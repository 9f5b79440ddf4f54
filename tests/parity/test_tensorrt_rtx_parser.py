"""TensorRT-RTX's parser takes the graphs of bundles, cut at their attention nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from chai_export.clustering.clusters import Clusters
from chai_export.graph.stage import rewrite
from tests.helpers.onnx_fixtures import REWRITTEN, Fixture
from tests.helpers.tensorrt_rtx import cut_at_attention, parse

pytest.importorskip("tensorrt_rtx_bindings")

AT_ONCE = ("C-torch-2.13.0-opset23-sdpa-gqa", "G-genai-0.18.0-cuda-fp16-gqa", "H-genai-0.18.0-dml-fp16-mha")
CASES = [
    pytest.param(fixture, id=fixture.name, marks=() if fixture.name in AT_ONCE else pytest.mark.slow)
    for fixture in REWRITTEN
    if not fixture.quantised  # MatMulNBits is not ONNX's
]


@pytest.mark.parametrize("fixture", CASES)
def test_everything_but_attention_is_parsed(fixture: Fixture, tmp_path: Path) -> None:
    bundle = rewrite(fixture.path, Clusters([fixture.kv_heads] * fixture.layers), tmp_path / "bundle")
    layers, reason = parse(cut_at_attention(bundle.model_path, bundle.path / "cut.onnx"))
    assert reason == ""
    assert layers > 100
