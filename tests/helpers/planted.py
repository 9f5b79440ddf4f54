"""A random Llama whose heads were duplicated on purpose, so that the right answer of clustering is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Per layer one letter per KV head; heads with the same letter have equal query and key projections.
MHA_GROUPS = ("ABAACABD", "AAAAAAAA", "ABCDEFGA", "AABBBABC")
GQA_GROUPS = ("ABAC", "AABA", "ABCD")


def planted_model(
    groups: Sequence[str] = MHA_GROUPS, query_heads: int = 8, seed: int = 0
) -> LlamaForCausalLM:
    """Llama with ``len(groups[0])`` KV heads; the query heads of equal KV heads are equal one by one.

    Values stay different per head, so that sharing more than scores would show.
    """
    torch.manual_seed(seed)
    kv_heads = len(groups[0])
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=len(groups), num_attention_heads=query_heads,
        num_key_value_heads=kv_heads, vocab_size=128, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.2 * parameter.shape[1] ** -0.5)
        for layer, letters in zip(model.model.layers, groups, strict=True):
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                per_kv_head = projection.weight.view(kv_heads, -1, config.hidden_size)
                for head, letter in enumerate(letters):
                    per_kv_head[head] = per_kv_head[letters.index(letter)].clone()
    return model


def distinct(groups: Sequence[str]) -> list[int]:
    """How many different KV heads each layer has."""
    return [len(set(letters)) for letters in groups]
