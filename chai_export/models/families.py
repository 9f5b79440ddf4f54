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
        tested: the tiny configurations (tests/families.py) that are taken from export to verified logits.
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

_TABLE = (
    Family("biogpt", "BioGPT", position_table=True),
    Family("bloom", "BLOOM", refused="ALiBi adds a bias of its own per head to the scores"),
    Family("codegen", "CodeGen", ("codegen",), attention=Attention.METHOD, position_table=True),
    Family("falcon", "Falcon", ("falcon-gqa", "falcon-mqa"), Attention.CALL, _falcon_kv_heads),
    Family("flint", "Flint", refused=_SINKS),
    Family("gemma", "Gemma", ("gemma-gqa",)),
    Family("gpt-sw3", "GPT-SW3", position_table=True),
    Family("gpt2", "GPT-2", ("gpt2",), position_table=True),
    Family("gpt_bigcode", "GPTBigCode", kv_heads=_one_if_multi_query, position_table=True),
    Family("gpt_neox", "GPT-NeoX", ("gpt_neox",)),
    Family("gpt_oss", "gpt-oss", refused=_SINKS),
    Family("gptj", "GPT-J", ("gptj",), attention=Attention.METHOD, position_table=True),
    Family("granite_swa", "Granite with sinks", refused=_SINKS),
    Family("granitemoe_swa", "Granite MoE with sinks", refused=_SINKS),
    Family("hy_v4", "Hunyuan 4", refused=_SINKS),
    Family("llama", "Llama", ("llama-mha", "llama-gqa")),
    Family("mimo_v2_flash", "MiMo V2 Flash", refused=_SINKS),
    Family("mistral", "Mistral", ("mistral-mha", "mistral-gqa")),
    Family("mixtral", "Mixtral", ("mixtral-gqa",)),
    Family("olmo", "OLMo", ("olmo-mha", "olmo-gqa")),
    Family("olmo2", "OLMo 2", ("olmo2-gqa",)),
    Family("opt", "OPT", ("opt",), position_table=True),
    Family("phi", "Phi", ("phi-mha", "phi-gqa")),
    Family("phi3", "Phi-3", ("phi3-gqa",)),
    Family("qwen2", "Qwen2", ("qwen2-mha", "qwen2-gqa")),
    Family("qwen2_moe", "Qwen2-MoE", ("qwen2_moe-gqa",)),
    Family("qwen3", "Qwen3", ("qwen3-mha", "qwen3-gqa")),
    Family("stablelm", "StableLM", ("stablelm-mha", "stablelm-gqa")),
)

FAMILIES = {family.model_type: family for family in _TABLE}


def family_of(model_type: str) -> Family:
    """The row of a family; one of defaults, tested with nothing, if it has none."""
    return FAMILIES.get(model_type) or Family(model_type, model_type)


def covered_families() -> list[Family]:
    """The families that are taken from export to verified logits in the tests, by name."""
    return sorted((family for family in _TABLE if family.tested), key=lambda family: family.name.lower())
