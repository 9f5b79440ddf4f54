"""Tiny random models, one per supported family and head layout, made from configurations and a seed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_HEADS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 96}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MODERN = {**_HEADS, **_SPECIAL, "intermediate_size": 96, "max_position_embeddings": 128}
_FALCON = {**_HEADS, **_SPECIAL, "max_position_embeddings": 128}
_EXPERTS = {"num_experts_per_tok": 2}
_GPT = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 128,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {**_MODERN, "num_key_value_heads": 8}),
    "llama-gqa": ("llama", {**_MODERN, "num_key_value_heads": 2}),
    "mistral-mha": ("mistral", {**_MODERN, "num_key_value_heads": 8, "sliding_window": None}),
    "mistral-gqa": ("mistral", {**_MODERN, "num_key_value_heads": 4, "sliding_window": None}),
    "qwen2-mha": ("qwen2", {**_MODERN, "num_key_value_heads": 8}),
    "qwen2-gqa": ("qwen2", {**_MODERN, "num_key_value_heads": 2}),
    "qwen3-mha": ("qwen3", {**_MODERN, "num_key_value_heads": 8, "head_dim": 16}),
    "qwen3-gqa": ("qwen3", {**_MODERN, "num_key_value_heads": 4, "head_dim": 16}),
    "opt": ("opt", {**_MODERN, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt2": ("gpt2", {**_GPT, "initializer_range": 0.2}),
    "gpt_neox": ("gpt_neox", {**_MODERN, "rotary_pct": 0.5}),
    "phi-mha": ("phi", {**_MODERN, "num_key_value_heads": 8}),
    "phi-gqa": ("phi", {**_MODERN, "num_key_value_heads": 4}),
    "stablelm-mha": ("stablelm", {**_MODERN, "num_key_value_heads": 8}),
    "stablelm-gqa": ("stablelm", {**_MODERN, "num_key_value_heads": 2}),
    "olmo-mha": ("olmo", {**_MODERN, "num_key_value_heads": 8}),
    "olmo-gqa": ("olmo", {**_MODERN, "num_key_value_heads": 2, "clip_qkv": 2.0}),
    "olmo2-gqa": ("olmo2", {**_MODERN, "num_key_value_heads": 4}),
    "gemma-gqa": ("gemma", {**_MODERN, "num_key_value_heads": 2, "head_dim": 16}),
    "phi3-gqa": ("phi3", {**_MODERN, "num_key_value_heads": 4, "sliding_window": None}),
    "qwen2_moe-gqa": ("qwen2_moe", {**_MODERN, **_EXPERTS, "num_key_value_heads": 4, "num_experts": 4,
                                    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "mixtral-gqa": ("mixtral", {**_MODERN, **_EXPERTS, "num_key_value_heads": 4, "num_local_experts": 4,
                                "sliding_window": None}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 4}),
    "falcon-gqa": ("falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-mqa": ("falcon", {**_FALCON, "multi_query": True}),
}  # fmt: skip


def family_config(name: str, **changes: Any) -> Any:
    """Configuration of a tiny model of FAMILIES; ``changes`` override single fields."""
    model_type, options = FAMILIES[name]
    return AutoConfig.for_model(model_type, **{**options, "dtype": "float32", **changes})


def family_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family, its attention far from uniform so that wrong maps show in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(name, **changes)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model
