"""Attention that the op cannot express is refused, with the layer and the reason, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.exporter.torch_export import export_onnx
from chai_export.graph.stage import explain, rewrite

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

CASES: dict[str, tuple[str, dict[str, Any], str, int, str]] = {
    "alibi in bfloat16": (
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "alibi": True,
        },
        "eager",
        18,
        "bias",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_by_layer_and_reason(case: str, tmp_path: Path) -> None:
    model_type, options, attention, opset, reason = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    source = tmp_path / "source"
    source.mkdir()
    path = export_onnx(model, source, opset=opset, attention=attention)
    with pytest.raises(ChaiError, match=f"layer 0.*{reason}") as caught:
        rewrite(path, Clusters((1,)), tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    explanation = explain(path)
    assert not explanation.rewritable
    assert reason in explanation.verdict
    assert reason in explanation.rows()[0][-1]
