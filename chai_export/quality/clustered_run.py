"""The torch model with head maps from any method: what methods are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chai_export.models.attention import attention_of, probe_probabilities
from chai_export.models.oracle import clustered_attention
from chai_export.models.scoring import Scoring
from chai_export.quality.methods import Method
from chai_export.quality.methods_medoids import HeadMap, Probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ChooseMap = Callable[[int, Tensor, Tensor, Scoring], HeadMap]
"""(layer, query [1,H,S,D], key [1,G,S,D], scoring) -> head map int32 [H]."""


def logits_with_maps(
    model: PreTrainedModel, token_ids: Sequence[int] | NDArray[Any], choose: ChooseMap, exact: int
) -> NDArray[np.float32]:
    """Logits of one sequence whose layers share scores as ``choose`` says.

    The torch oracle with two more freedoms: the map may depend on anything the layer sees, and the probe
    need not be exact.

    Args:
        model: a supported decoder.
        token_ids: T token ids.
        choose: decides the head map of each layer.
        exact: the first tokens, which attend with all heads.

    Returns:
        float32 [T, V].
    """

    def layer(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        head_map = torch.from_numpy(choose(index, query, key, scoring).astype(np.int64))
        return clustered_attention(query, key, value, head_map, scoring, min(exact, query.shape[2]))

    batch = torch.tensor([[int(token) for token in token_ids]], dtype=torch.long)
    with attention_of(model, layer), torch.inference_mode():
        logits: NDArray[np.float32] = model(input_ids=batch, use_cache=False).logits[0].float().numpy()
    return logits


def method_maps(method: Method, kept_heads: Sequence[int], probe_tokens: int, seed: int) -> ChooseMap:
    """How an online method decides a layer's map from the first ``probe_tokens`` tokens of a sequence."""
    if method.rule is None:
        raise ValueError(f"{method.name} has no online rule; use fixed_maps")
    rule, layers = method.rule, len(kept_heads)

    def choose(layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> HeadMap:
        features = probe(query, key, scoring, probe_tokens, causal=method.causal)
        return rule(features, key.shape[1], kept_heads[layer], seed * layers + layer)

    return choose


def fixed_maps(head_maps: NDArray[np.int32]) -> ChooseMap:
    """Maps decided before: int32 [L, H]."""

    def choose(layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> HeadMap:
        del query, key, scoring
        head_map: HeadMap = head_maps[layer]
        return head_map

    return choose


def probe(query: Tensor, key: Tensor, scoring: Scoring, tokens: int, *, causal: bool) -> Probabilities:
    """Probabilities of the first tokens of one sequence over each other, float32 [H, t, t].

    Without the mask every probe token sees all probe tokens, as in the paper's reference code.
    """
    tokens = min(tokens, query.shape[2])
    if causal:
        probabilities: Probabilities = probe_probabilities(query, key, scoring, tokens)[0].numpy()
        return probabilities
    keys = key[:, :, :tokens].float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = scoring.scores(query[:, :, :tokens].float() @ keys.transpose(2, 3))
    unmasked: Probabilities = torch.softmax(scores, dim=-1)[0].numpy()
    return unmasked
