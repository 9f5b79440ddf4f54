"""Single mistakes of the kind that exporters, rewrites and kernels make, each in one place of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from chai_export.models.oracle import Oracle

Mistake = Callable[[PreTrainedModel], bool]
"""Changes a model in place; False where it has nothing of the kind."""


def _layers(model: PreTrainedModel) -> Any:
    return model.model.layers if model.config.model_type in ("llama", "olmo2", "gemma") else None


def _scores(model: PreTrainedModel) -> bool:
    layers = _layers(model)
    if layers is None:
        return False
    layers[-1].self_attn.scaling *= 1.01
    return True


def _epsilon(model: PreTrainedModel) -> bool:
    if model.config.model_type != "llama":
        return False
    for layer in _layers(model):
        layer.input_layernorm.variance_epsilon *= 2
    return True


def _value_heads(model: PreTrainedModel) -> bool:
    layers = _layers(model)
    if layers is None:
        return False
    weight, size = layers[-1].self_attn.v_proj.weight, layers[-1].self_attn.head_dim
    weight[: 2 * size] = torch.cat([weight[size : 2 * size], weight[:size]])
    return True


def _frequency(model: PreTrainedModel) -> bool:
    if _layers(model) is None:
        return False
    model.model.rotary_emb.inv_freq[len(model.model.rotary_emb.inv_freq) // 2] *= 1.02
    return True


def _positions(model: PreTrainedModel) -> bool:
    """Every position after the 16th token is one too high, as when a chunk's offset is wrong."""
    if _layers(model) is None:
        return False
    forward = model.model.rotary_emb.forward

    def shifted(x: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> Any:
        return forward(x, position_ids + (position_ids >= 16), **options)

    model.model.rotary_emb.forward = shifted
    return True


def _query_head(model: PreTrainedModel) -> bool:
    layers = _layers(model)
    if layers is None:
        return False
    weight, size = layers[0].self_attn.q_proj.weight, layers[0].self_attn.head_dim
    weight[: 2 * size] = torch.cat([weight[size : 2 * size], weight[:size]])
    return True


MISTAKES: dict[str, Mistake] = {
    "scores of the last layer 1 % larger": _scores,
    "epsilon of the norms doubled": _epsilon,
    "one RoPE frequency 2 % higher": _frequency,
    "positions from the 16th on too high by one": _positions,
    "two value heads of the last layer exchanged": _value_heads,
    "two query heads of the first layer exchanged": _query_head,
}

Run = Callable[[list[int], NDArray[np.int32]], NDArray[np.float32] | None]
"""(token ids, right head maps [L, H]) to wrong logits [T, V], None where nothing is to be got wrong."""


def mistaken_maps(model: PreTrainedModel, kept: list[int]) -> dict[str, Run]:
    """Ways to compute something else than what the head maps say."""
    right, early, late = (Oracle(model, kept, probe_tokens) for probe_tokens in (5, 4, 6))

    def one_head(ids: list[int], maps: NDArray[np.int32]) -> NDArray[np.float32] | None:
        wrong = maps.copy()
        shared = np.argwhere(maps != np.arange(maps.shape[1]))
        if not len(shared):
            return None
        layer, head = shared[-1]
        others = [x for x in np.unique(maps[layer]) if x != maps[layer, head]]
        if not others:
            return None
        wrong[layer, head] = others[0]
        return right.logits(ids, wrong)

    return {
        "one head of one layer follows another representative": one_head,
        "sharing begins one token early": early.logits,
        "sharing begins one token late": late.logits,
    }
