"""What a method of the scoreboard is: how a layer attends with its cache, and what that cache takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chai_export.models.attention import LayerFunction
from chai_export.models.scoring import Scoring
from chai_export.op.heads import DecoderHeads

HALF = 2
"""Bytes of a float16."""


@dataclass(frozen=True)
class CacheMethod:
    """One method at one setting.

    Attributes:
        name: of the method, as tables and ``--methods`` have it.
        setting: what sets it apart from others of that name.
        attend: a layer's attention over one fresh sequence, batch 1, as a run that goes token by token
            through the method's cache would compute it.
        cache_bytes: of all layers for a row of so many tokens, with all that reading it back takes: scales,
            minima, indices, rows that are kept exact.
        on_op: whether the op of this project runs it.
    """

    name: str
    setting: str
    attend: LayerFunction
    cache_bytes: Callable[[int], float]
    on_op: bool = False


def float16_bytes(heads: DecoderHeads, tokens: int) -> int:
    """What all heads of all layers take in float16, the common yardstick."""
    width = heads.head_dim + heads.value_head_dim
    return HALF * tokens * heads.num_layers * heads.num_kv_heads * width


def attended(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, unseen: Tensor | None = None
) -> Tensor:
    """Causal attention of query heads on their KV heads.

    Args:
        query: [1, H, S, D].
        key: [1, G, S, D].
        value: [1, G, S, Dv].
        scoring: of the layer.
        unseen: bool [1, G or 1, S, S], keys that a query does not see besides those that come later.

    Returns:
        float32 [1, H, S, Dv].
    """
    return weights(query, key, scoring, unseen) @ per_query_head(value, query)


def weights(query: Tensor, key: Tensor, scoring: Scoring, unseen: Tensor | None = None) -> Tensor:
    """Probabilities of :func:`attended`, float32 [1, H, S, S]."""
    products = query.float() @ per_query_head(key, query).transpose(2, 3)
    hidden = None
    if unseen is not None:
        group = query.shape[1] // key.shape[1]
        hidden = unseen.repeat_interleave(group, dim=1) if unseen.shape[1] > 1 else unseen
    return scoring.probabilities(products, 0, unseen=hidden)


def per_query_head(rows: Tensor, query: Tensor) -> Tensor:
    """Rows of KV heads [1, G, …] for each query head that reads them, float32 [1, H, …]."""
    return rows.float().repeat_interleave(query.shape[1] // rows.shape[1], dim=1)


def asymmetric(rows: Tensor, bits: int, dim: int) -> Tensor:
    """Rows quantised to ``bits`` with a scale and a minimum, both float16, over all of one dimension."""
    largest = float(2**bits - 1)
    low = rows.amin(dim, keepdim=True).half().float()
    scale = ((rows.amax(dim, keepdim=True) - low) / largest).half().float()
    codes = torch.where(scale > 0, ((rows - low) / scale).round().clamp(0, largest), torch.zeros_like(rows))
    return codes * scale + low
