"""Tiny random models, one per tested family and head layout, made from configurations and a seed.

Their names stand in the table of :mod:`chai_export.models.families`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_HEADS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 96}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MODERN = {**_HEADS, **_SPECIAL, "intermediate_size": 96, "max_position_embeddings": 128}
_FALCON = {**_HEADS, **_SPECIAL, "max_position_embeddings": 128}
_GQA = {**_MODERN, "num_key_value_heads": 4}
_WINDOW = {**_GQA, "sliding_window": 6}
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
"""A layer with a window before one without."""
_SCALED = {"attention_multiplier": 0.2}
_EXPERTS = {"num_experts_per_tok": 2}
_SMALL_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
           "moe_intermediate_size": 16}  # fmt: skip
_GPT = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 128,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_ALWAYS: dict[str, tuple[str, dict[str, Any]]] = {
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

_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", {**_MIXED, **_EXPERTS, **_SMALL_EXPERTS}),
    "apertus-gqa": ("apertus", _GQA),
    "arcee-gqa": ("arcee", _GQA),
    "biogpt": ("biogpt", _MODERN),
    "bloom": ("bloom", {**_SPECIAL, "hidden_size": 64, "n_layer": 2, "n_head": 8, "vocab_size": 96,
                        "max_position_embeddings": 128}),
    "cohere-gqa": ("cohere", {**_GQA, "use_qk_norm": True}),
    "cohere2-window": ("cohere2", _MIXED),
    "cohere2_moe": ("cohere2_moe", {**_MIXED, **_EXPERTS, **_SMALL_EXPERTS}),
    "ernie4_5-gqa": ("ernie4_5", {**_GQA, "head_dim": 8}),
    "ernie4_5_moe-gqa": ("ernie4_5_moe", {**_GQA, "moe_num_experts": 4, "moe_k": 2,
                                          "moe_intermediate_size": 16, "moe_layer_start_index": 0}),
    "exaone4-window": ("exaone4", {**_WINDOW, "sliding_window_pattern": 2}),
    "exaone_moe": ("exaone_moe", {**_MIXED, **_EXPERTS, **_SMALL_EXPERTS}),
    "flex_olmo-gqa": ("flex_olmo", {**_GQA, **_EXPERTS, "num_experts": 4}),
    "flint": ("flint", {**_MIXED, **_EXPERTS, **_SMALL_EXPERTS}),
    "gemma2": ("gemma2", {**_MIXED, "head_dim": 8, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 30.0}),
    "gemma3-window": ("gemma3_text", {**_MIXED, "head_dim": 8, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}}),
    "glm-gqa": ("glm", {**_GQA, "head_dim": 8}),
    "glm4-gqa": ("glm4", {**_GQA, "head_dim": 8}),
    "glm4_moe-gqa": ("glm4_moe", {**_GQA, **_ROUTED, "head_dim": 8}),
    "gpt_bigcode-mha": ("gpt_bigcode", {**_GPT, "multi_query": False}),
    "gpt_bigcode-mqa": ("gpt_bigcode", {**_GPT, "multi_query": True}),
    "gpt_oss": ("gpt_oss", {**_MIXED, **_EXPERTS, "head_dim": 8, "num_local_experts": 4}),
    "granite-gqa": ("granite", {**_GQA, **_SCALED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                                "logits_scaling": 2.0}),
    "granitemoe-gqa": ("granitemoe", {**_GQA, **_SCALED, **_EXPERTS, "num_local_experts": 4}),
    "granitemoeshared-gqa": ("granitemoeshared", {**_GQA, **_SCALED, **_EXPERTS, "num_local_experts": 4,
                                                  "shared_intermediate_size": 16}),
    "helium-gqa": ("helium", {**_GQA, "head_dim": 8}),
    "hunyuan-gqa": ("hunyuan_v1_dense", {**_GQA, "head_dim": 8}),
    "hunyuan_moe-gqa": ("hunyuan_v1_moe", {**_GQA, "head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    "hyperclovax-gqa": ("hyperclovax", _GQA),
    "internlm3-gqa": ("internlm3", {**_GQA, "head_dim": 8}),
    "jais2-gqa": ("jais2", _GQA),
    "minimax_m2-gqa": ("minimax_m2", {**_GQA, **_EXPERTS, "head_dim": 8, "num_local_experts": 4}),
    "laguna": ("laguna", {**_MIXED, **_EXPERTS, **_SMALL_EXPERTS}),
    "ministral-window": ("ministral", {**_WINDOW, "head_dim": 8}),
    "ministral3-gqa": ("ministral3", {**_GQA, "head_dim": 8, "sliding_window": None}),
    "mistral-window": ("mistral", _WINDOW),
    "nanochat-gqa": ("nanochat", _GQA),
    "nemotron-gqa": ("nemotron", {**_GQA, "head_dim": 8}),
    "olmo3-window": ("olmo3", _MIXED),
    "olmoe-gqa": ("olmoe", {**_GQA, **_EXPERTS, "num_experts": 4}),
    "persimmon": ("persimmon", _MODERN),
    "phi3-window": ("phi3", _WINDOW),
    "phimoe-gqa": ("phimoe", {**_GQA, **_EXPERTS, "num_local_experts": 4, "sliding_window": None}),
    "qwen2-window": ("qwen2", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3_moe-gqa": ("qwen3_moe", {**_GQA, **_EXPERTS, "head_dim": 16, "num_experts": 4,
                                    "moe_intermediate_size": 16}),
    "seed_oss-gqa": ("seed_oss", {**_GQA, "head_dim": 16}),
    "smollm3-gqa": ("smollm3", {**_GQA, "no_rope_layer_interval": 2}),
    "smollm3-window": ("smollm3", {**_WINDOW, "no_rope_layer_interval": 2, "use_sliding_window": True}),
    "starcoder2-gqa": ("starcoder2", {**_GQA, "sliding_window": None}),
    "starcoder2-window": ("starcoder2", _WINDOW),
    "vaultgemma": ("vaultgemma", {**_MIXED, "head_dim": 8, "attn_logit_softcapping": 2.0,
                                  "final_logit_softcapping": 30.0}),
}  # fmt: skip

FAMILIES = {**_ALWAYS, **_MORE}

MIXED = frozenset(
    {"afmoe", "cohere2-window", "cohere2_moe", "exaone4-window", "exaone_moe", "flint", "gemma2",
     "gemma3-window", "gpt_oss", "laguna", "olmo3-window", "qwen2-window", "smollm3-window",
     "vaultgemma"}
)  # fmt: skip
"""Those with layers of two kinds."""

GRAPHS_IN_CI = frozenset(_ALWAYS)
"""Those whose bundles are run step by step in CI."""
_GRAPH_ALONE = {
    "codegen", "gptj", "mistral-mha", "stablelm-mha", "qwen2_moe-gqa", "phi3-gqa", "gemma-gqa",
    "stablelm-gqa", "olmo-mha", "opt", "gpt_neox", "falcon-mqa",
}  # fmt: skip
"""Their graphs are compared with the model in CI; the gate would export each once more."""
GATES_IN_CI = GRAPHS_IN_CI - _GRAPH_ALONE | {
    "apertus-gqa", "cohere-gqa", "cohere2-window", "exaone4-window", "glm4-gqa", "gpt_bigcode-mqa",
    "granitemoe-gqa", "helium-gqa", "minimax_m2-gqa", "nemotron-gqa", "persimmon", "smollm3-gqa",
}  # fmt: skip
"""Those that are exported and verified in CI: of the others, each is like one of these but for sizes."""


def each_family(in_ci: frozenset[str]) -> list[Any]:
    """Every name of FAMILIES as a parameter of a test; all but ``in_ci`` in the slow set only."""
    return [pytest.param(name, marks=[] if name in in_ci else [pytest.mark.slow]) for name in FAMILIES]


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
