"""A Llama with Cross-Layer Attention: of every ``kv_sharing`` layers the first has keys and values for all.

Written as code that a model brings along, so it stands alone; consumers mark themselves as transformers'
Gemma 3n does, and the tensors are handed on in a dictionary.
"""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


class ClaConfig(LlamaConfig):
    model_type = "tiny_cla"

    def __init__(self, kv_sharing=2, **options):
        self.kv_sharing = kv_sharing
        super().__init__(**options)


class ClaAttention(LlamaAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.kv_shared_layer_index = layer_idx - layer_idx % config.kv_sharing
        self.is_kv_shared_layer = self.kv_shared_layer_index != layer_idx
        if self.is_kv_shared_layer:
            del self.k_proj, self.v_proj

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        shared_kv_states=None,
        **kwargs,
    ):
        width = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(width).transpose(1, 2)
        cos, sin = position_embeddings
        if self.is_kv_shared_layer:
            query, _ = apply_rotary_pos_emb(query, query, cos, sin)
            key, value = shared_kv_states[self.kv_shared_layer_index]
        else:
            key = self.k_proj(hidden_states).view(width).transpose(1, 2)
            value = self.v_proj(hidden_states).view(width).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            shared_kv_states[self.layer_idx] = key, value
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class ClaModel(LlamaModel):
    config_class = ClaConfig

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = ClaAttention(config, index)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids, shared_kv_states={}, **kwargs)


class ClaForCausalLM(LlamaForCausalLM):
    config_class = ClaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = ClaModel(config)
        self.post_init()


ClaConfig.register_for_auto_class()
ClaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
