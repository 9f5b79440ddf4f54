"""How a Hugging Face causal language model is called while it is traced: the cache as flat tensors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chai_export.errors import ChaiError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KvPair = tuple[torch.Tensor, torch.Tensor]


class FlatCacheDecoder(nn.Module):
    """A causal language model whose cache goes in and out as one (key, value) pair per layer that has one.

    ``forward`` takes input_ids int64 [B, S], attention_mask int64 [B, P+S], the pairs [B, G, P, D] and, for
    models that have them, position_ids int64 [B, S]; it returns logits [B, S, V] and then key and value
    [B, G, P+S, D] of each pair. ``cache_layers`` are the layers of the pairs, ascending.
    """

    def __init__(self, model: PreTrainedModel, cache_layers: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.cache_layers = tuple(cache_layers)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Sequence[KvPair],
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Run the model once over the new tokens."""
        from transformers.cache_utils import DynamicCache

        extra = {} if position_ids is None else {"position_ids": position_ids}
        cache = DynamicCache()
        for layer, (key, value) in zip(self.cache_layers, past_key_values, strict=True):
            cache.update(key, value, layer)
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        layers = [result.past_key_values.layers[layer] for layer in self.cache_layers]
        return (result.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Whether ``model.forward`` has a position_ids argument (BLOOM and MPT have none)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def cache_shapes(model: PreTrainedModel) -> dict[int, tuple[tuple[int, int], tuple[int, int]]]:
    """(KV heads, head dim) of key and of value by layer, seen by running the model on two tokens.

    Layers that read an earlier layer's cache have none.

    Raises:
        ChaiError: the model keeps no plain key/value cache.
    """
    try:
        with torch.no_grad():
            result = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
        layers: Any = result.past_key_values.layers
        shapes = {
            index: (tuple(layer.keys.shape), tuple(layer.values.shape))
            for index, layer in enumerate(layers)
            if layer.is_initialized
        }
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise ChaiError(
            f"{type(model).__name__} keeps no key/value cache that chai_export knows ({error}); "
            "choose a decoder-only model with standard attention"
        ) from error
    return {index: ((key[1], key[3]), (value[1], value[3])) for index, (key, value) in shapes.items()}
