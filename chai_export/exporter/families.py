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
    """A causal language model whose cache goes in and out as one (key, value) pair per layer.

    ``forward`` takes input_ids int64 [B, S], attention_mask int64 [B, P+S], the pairs [B, G, P, D] and, for
    models that have them, position_ids int64 [B, S]; it returns logits [B, S, V] and then key and value
    [B, G, P+S, D] of each layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

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
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache([tuple(pair) for pair in past_key_values]),
            use_cache=True,
            **extra,
        )
        caches = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (result.logits, *caches)


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Whether ``model.forward`` has a position_ids argument (BLOOM and MPT have none)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def cache_shapes(model: PreTrainedModel) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(KV heads, head dim) of key and of value for each layer, seen by running the model on two tokens.

    Raises:
        ChaiError: the model keeps no plain key/value cache.
    """
    try:
        with torch.no_grad():
            result = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
        layers: Any = result.past_key_values.layers
        shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers]
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise ChaiError(
            f"{type(model).__name__} keeps no key/value cache that chai_export knows ({error}); "
            "choose a decoder-only model with standard attention"
        ) from error
    return [((key[1], key[3]), (value[1], value[3])) for key, value in shapes]
