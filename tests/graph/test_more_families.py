"""Families beyond the first list: exported and rewritten, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.exporter.stage import export
from chai_export.exporter.torch_export import export_onnx
from chai_export.graph.load import read_model
from chai_export.graph.stage import rewrite

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
GPT: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 64,
    "rotary_dim": 4,
}
FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "alibi": False,
}
EXPERTS = {"num_experts_per_tok": 2}

EXPORTED: dict[str, dict[str, Any]] = {
    "gemma": {**LLAMA, "head_dim": 8},
    "phi3": {**LLAMA, "sliding_window": None, "pad_token_id": 0},
    "qwen2_moe": {
        **LLAMA, **EXPERTS, "num_experts": 4,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "mixtral": {**LLAMA, **EXPERTS, "num_local_experts": 4, "sliding_window": None},
}  # fmt: skip
# transformers computes their attention outside its attention interface, so there is no torch oracle and
# `export` refuses them; an ONNX file of them is rewritten like any other.
REWRITTEN: dict[str, tuple[str, dict[str, Any], int]] = {
    "gptj": ("gptj", GPT, 4),
    "codegen": ("codegen", GPT, 4),
    "falcon-gqa": ("falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}, 4),
    "falcon-mqa": ("falcon", {**FALCON, "multi_query": True, "new_decoder_architecture": False}, 1),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "ALiBi"),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 128}, "ALiBi"),
    "gemma2": ({**LLAMA, "head_dim": 8}, "soft-capped"),
    "gptj": (GPT, "attention interface"),
}


def make(model_type: str, options: dict[str, Any], **how: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), **how).eval()


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_with_heads_shared(name: str, tmp_path: Path) -> None:
    bundle = export(make(name, EXPORTED[name]), Clusters(kept_heads=[1, 2]), tmp_path / "bundle")
    assert bundle.manifest.proof.max_abs_diff <= 1e-4
    ops = [node.op_type for node in read_model(bundle.model_path).graph]
    assert ops.count("ClusteredHeadAttention") == 2
    if "num_experts_per_tok" in EXPORTED[name]:
        assert "TopK" in ops, "the router is no longer there"


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten_from_onnx(name: str, tmp_path: Path) -> None:
    model_type, options, kv_heads = REWRITTEN[name]
    source = tmp_path / "source"
    source.mkdir()
    model = make(model_type, options, attn_implementation="eager")
    path = export_onnx(model, source, opset=18, attention="eager")
    bundle = rewrite(path, Clusters(kept_heads=[max(1, kv_heads - 1)] * 2), tmp_path / "bundle")
    assert bundle.manifest.num_kv_heads == kv_heads
    assert bundle.manifest.proof.max_abs_diff <= 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    options, reason = REFUSED[name]
    with pytest.raises(ChaiError, match=reason):
        export(make(name, options), Clusters(kept_heads=[1, 1]), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
