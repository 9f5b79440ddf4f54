"""Families with attention code of their own, mixtures of experts, and families refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.exporter.stage import export
from chai_export.graph.read.load import read_model
from chai_export.graph.stage import explain
from tests.helpers.exported import bundle_of, exported

REWRITTEN = {"gptj": 8, "codegen": 8, "falcon-gqa": 8, "falcon-mqa": 1}
"""KV heads in the cache: Falcon's newer architecture caches repeated ones."""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64}, "layers 0-1: ALiBi"),
    "falcon": ({**SIZES, "alibi": True}, "layers 0-1: ALiBi"),
}


@pytest.mark.parametrize("name", ["qwen2_moe-gqa", "mixtral-gqa"])
def test_experts_are_left_as_they_are(name: str) -> None:
    ops, before = ([node.op_type for node in read_model(path).graph] for path in paths(name))
    assert ops.count("ClusteredHeadAttention") == before.count("Attention") == 1
    assert ops.count("TopK") == before.count("TopK") == 1, "the router is no longer there"


def paths(name: str) -> tuple[Path, Path]:
    return bundle_of(name).model_path, exported(name)


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten_from_an_eager_graph(name: str) -> None:
    bundle = bundle_of(name, 18, "eager")
    assert bundle.manifest.num_kv_heads == REWRITTEN[name]
    assert bundle.manifest.proof is not None
    assert bundle.manifest.proof.max_abs_diff <= 1e-4
    assert {row[1] for row in explain(exported(name, 18, "eager")).rows()} == {"B"}


@pytest.mark.parametrize("name", REFUSED)
def test_export_refuses_by_layer_and_reason(name: str, tmp_path: Path) -> None:
    """Their ONNX files are refused in test_refusals.py; torch.onnx traces no MPT with a cache."""
    options, reason = REFUSED[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
    with pytest.raises(ChaiError, match=reason):
        export(model, Clusters(kept_heads=[1, 1]), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
