"""Tiny models as GGUF files, laid out as llama.cpp's converter does with their Hugging Face weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
SPECIAL = ("<unk>", "<s>", "</s>")
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama() -> LlamaForCausalLM:
    """Grouped-query attention, widths that blocks of 32 divide."""
    import torch

    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(SPECIAL) + len(LETTERS), max_position_embeddings=512,
        rope_theta=10000.0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval()


def write_gguf(
    model: LlamaForCausalLM, path: Path, kind: str = "F32", architecture: str = "llama"
) -> dict[str, NDArray[np.float32]]:
    """Write a model; what its weights are once they are read back, by Hugging Face's names."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    read = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        quantised = weight.ndim == 2 and kind != "F32"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        own = next((count for part, count in heads.items() if part in name), None)
        laid = weight if own is None else _interleaved(weight, own)
        if quantised:
            of_type = gguf.GGMLQuantizationType[kind]
            blocks = gguf.quants.quantize(laid, of_type)
            writer.add_tensor(_name(name), blocks, raw_dtype=of_type)
            back = gguf.quants.dequantize(blocks, of_type)
        else:
            writer.add_tensor(_name(name), laid)
            back = laid
        read[name] = back if own is None else _halves(back, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp rotates neighbours, transformers halves: the rows of each head are in another order."""
    split = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def _halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    split = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def _name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
    whole["lm_head.weight"] = "output"
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Letters, as SentencePiece has them: ▁ for a space."""
    pieces = [*SPECIAL, *(letter.replace(" ", "▁") for letter in LETTERS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(SPECIAL) + [-1.0] * len(LETTERS))
    writer.add_token_types([2, 3, 3] + [1] * len(LETTERS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
