"""What is known of each family of models by its name: one table, read by code, tests and the README.

A family without a row is taken for one that follows transformers' attention interface and has one cache row
per KV head of its configuration; calibration then compares it with the op by numbers first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Attention(Enum):
    """How the attention of a family is reached in torch (:mod:`chai_export.models.attention`)."""

    INTERFACE = "transformers' attention interface"
    METHOD = "a method _attn of its attention modules"
    CALL = "a call of torch's scaled_dot_product_attention in its layers"
    PRODUCTS = "baddbmm with ALiBi, softmax and bmm in its layers"


def _kv_heads(config: Any, heads: int) -> int:
    value = getattr(config, "num_key_value_heads", None)
    return heads if not isinstance(value, int) or value < 1 else value


def _one_if_multi_query(config: Any, heads: int) -> int:
    return 1 if config.multi_query else heads


def _falcon_kv_heads(config: Any, heads: int) -> int:
    if config.new_decoder_architecture:
        return heads  # transformers repeats the KV heads first and caches the repeated ones
    return _one_if_multi_query(config, heads)


@dataclass(frozen=True)
class Family:
    """One row: a family as transformers implements it.

    Attributes:
        model_type: its name in config.json.
        name: its name in the README.
        tested: its tiny configurations (tests/helpers/families.py), taken from export to verified logits.
        attention: how its attention is reached.
        kv_heads: (configuration, query heads) to KV heads in the cache of each layer.
        position_table: whether it has one row per position, learned or of sines, past whose end nothing can
            be looked up.
        refused: what its scores have that the op cannot express, by its name alone; None for most.
    """

    model_type: str
    name: str
    tested: tuple[str, ...] = ()
    attention: Attention = Attention.INTERFACE
    kv_heads: Callable[[Any, int], int] = _kv_heads
    position_table: bool = False
    refused: str | None = None


_SINKS = "attention sinks take part in the softmax"

_SPARSE = "the activations are made sparse by an inverse error function, which torch.onnx cannot export"

_TABLE = (
    Family("apertus", "Apertus", ("apertus-gqa",)),
    Family("afmoe", "AFMoE", ("afmoe",)),
    Family("arcee", "Arcee", ("arcee-gqa",)),
    Family("biogpt", "BioGPT", ("biogpt",), position_table=True),
    Family("bloom", "BLOOM", ("bloom",), Attention.PRODUCTS),
    Family("codegen", "CodeGen", ("codegen",), Attention.METHOD, position_table=True),
    Family("cohere", "Cohere", ("cohere-gqa",)),
    Family("cohere2", "Cohere 2", ("cohere2-window",)),
    Family("cohere2_moe", "Cohere 2 MoE", ("cohere2_moe",)),
    Family("ernie4_5", "ERNIE 4.5", ("ernie4_5-gqa",)),
    Family("ernie4_5_moe", "ERNIE 4.5 MoE", ("ernie4_5_moe-gqa",)),
    Family("exaone4", "EXAONE 4", ("exaone4-window",)),
    Family("exaone_moe", "EXAONE MoE", ("exaone_moe",)),
    Family("falcon", "Falcon", ("falcon-gqa", "falcon-mqa"), Attention.CALL, _falcon_kv_heads),
    Family("flex_olmo", "FlexOlmo", ("flex_olmo-gqa",)),
    Family("flint", "Flint", ("flint",)),
    Family("gemma", "Gemma", ("gemma-gqa",)),
    Family("gemma2", "Gemma 2", ("gemma2",)),
    Family("gemma3_text", "Gemma 3", ("gemma3-window",)),
    Family("gemma3n_text", "Gemma 3n", refused=_SPARSE),
    Family("glm", "GLM", ("glm-gqa",)),
    Family("glm4", "GLM-4", ("glm4-gqa",)),
    Family("glm4_moe", "GLM-4-MoE", ("glm4_moe-gqa",)),
    Family("gpt-sw3", "GPT-SW3", position_table=True),
    Family("gpt2", "GPT-2", ("gpt2",), position_table=True),
    Family(
        "gpt_bigcode", "GPTBigCode", ("gpt_bigcode-mha", "gpt_bigcode-mqa"), kv_heads=_one_if_multi_query,
        position_table=True,
    ),
    Family("gpt_neox", "GPT-NeoX", ("gpt_neox",)),
    Family("gpt_oss", "gpt-oss", ("gpt_oss",)),
    Family("gptj", "GPT-J", ("gptj",), Attention.METHOD, position_table=True),
    Family("granite", "Granite", ("granite-gqa",)),
    Family("granite_swa", "Granite with sinks", refused=_SINKS),
    Family("granitemoe", "Granite MoE", ("granitemoe-gqa",)),
    Family("granitemoe_swa", "Granite MoE with sinks", refused=_SINKS),
    Family("granitemoeshared", "Granite MoE with shared experts", ("granitemoeshared-gqa",)),
    Family("helium", "Helium", ("helium-gqa",)),
    Family("hunyuan_v1_dense", "Hunyuan", ("hunyuan-gqa",)),
    Family("hunyuan_v1_moe", "Hunyuan-MoE", ("hunyuan_moe-gqa",)),
    Family("hy_v4", "Hunyuan 4", refused=_SINKS),
    Family("hyperclovax", "HyperCLOVA X", ("hyperclovax-gqa",)),
    Family("internlm3", "InternLM3", ("internlm3-gqa",)),
    Family("jais2", "Jais 2", ("jais2-gqa",)),
    Family("laguna", "Laguna", ("laguna",)),
    Family("llama", "Llama", ("llama-mha", "llama-gqa")),
    Family("mimo_v2_flash", "MiMo V2 Flash", refused=_SINKS),
    Family("minimax_m2", "MiniMax-M2", ("minimax_m2-gqa",)),
    Family("ministral", "Ministral", ("ministral-window",)),
    Family("ministral3", "Ministral 3", ("ministral3-gqa",)),
    Family("mistral", "Mistral", ("mistral-mha", "mistral-gqa", "mistral-window")),
    Family("mixtral", "Mixtral", ("mixtral-gqa",)),
    Family("nanochat", "nanochat", ("nanochat-gqa",)),
    Family("nemotron", "Nemotron", ("nemotron-gqa",)),
    Family("olmo", "OLMo", ("olmo-mha", "olmo-gqa")),
    Family("olmo2", "OLMo 2", ("olmo2-gqa",)),
    Family("olmo3", "OLMo 3", ("olmo3-window",)),
    Family("olmoe", "OLMoE", ("olmoe-gqa",)),
    Family("opt", "OPT", ("opt",), position_table=True),
    Family("persimmon", "Persimmon", ("persimmon",)),
    Family("phi", "Phi", ("phi-mha", "phi-gqa")),
    Family("phi3", "Phi-3", ("phi3-gqa", "phi3-window")),
    Family("phimoe", "Phi-3.5-MoE", ("phimoe-gqa",)),
    Family("qwen2", "Qwen2", ("qwen2-mha", "qwen2-gqa", "qwen2-window")),
    Family("qwen2_moe", "Qwen2-MoE", ("qwen2_moe-gqa",)),
    Family("qwen3", "Qwen3", ("qwen3-mha", "qwen3-gqa")),
    Family("qwen3_moe", "Qwen3-MoE", ("qwen3_moe-gqa",)),
    Family("seed_oss", "Seed-OSS", ("seed_oss-gqa",)),
    Family("smollm3", "SmolLM3", ("smollm3-gqa", "smollm3-window")),
    Family("stablelm", "StableLM", ("stablelm-mha", "stablelm-gqa")),
    Family("starcoder2", "StarCoder2", ("starcoder2-gqa", "starcoder2-window")),
    Family("vaultgemma", "VaultGemma", ("vaultgemma",)),
)  # fmt: skip

FAMILIES = {family.model_type: family for family in _TABLE}


def family_of(model_type: str) -> Family:
    """The row of a family; one of defaults, tested with nothing, if it has none."""
    return FAMILIES.get(model_type) or Family(model_type, model_type)


def covered_families() -> list[Family]:
    """The families that are taken from export to verified logits in the tests, by name in the README."""
    return sorted((family for family in _TABLE if family.tested), key=lambda family: family.name.lower())
