"""Methods that forget positions: by what was attended to so far, by distance, by head or by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chai_export.errors import ChaiError
from chai_export.models.scoring import Scoring
from chai_export.op.heads import DecoderHeads
from chai_export.quality.scoreboard.method import HALF, CacheMethod, attended, per_query_head
from chai_export.quality.scoreboard.observed import Observed, Seen

SINKS = 4
"""First positions that are always seen (arXiv 2309.17453)."""


def h2o(heads: DecoderHeads, budget: int) -> CacheMethod:
    """H2O (arXiv 2306.14048): half of the budget for the last positions, half for heavy hitters.

    A heavy hitter is a position with the largest sum of attention that it was given so far. A KV head forgets
    by the sum over its query heads.
    """
    return _heavy_hitters("h2o", heads, [budget] * heads.num_layers)


def squeeze(observed: Observed, budget: int, least: float = 0.3) -> CacheMethod:
    """SqueezeAttention (arXiv 2404.04793): layers whose attention changes the residual stream less get less.

    Layers are grouped in three by K-Means of the cosine similarity before and after attention; those of the
    group with the largest get the share ``least`` of the budget, and what they give up goes to the others in
    equal parts. Within a layer positions are forgotten as in :func:`h2o`.

    Raises:
        ChaiError: the similarity is not known for this model.
    """
    heads = observed.heads
    if len(observed.similarity) != heads.num_layers:
        raise ChaiError("SqueezeAttention needs a model of blocks model.layers[i].self_attn")
    small = _largest_of_three(torch.tensor(observed.similarity))
    others = heads.num_layers - int(small.sum())
    freed = budget * (1 - least) * int(small.sum())
    budgets = [
        max(2, round(budget * least)) if is_small else round(budget + freed / max(1, others))
        for is_small in small.tolist()
    ]
    return _heavy_hitters("squeeze", heads, budgets)


def _largest_of_three(values: Tensor) -> Tensor:
    """Which values are in the largest of three groups: K-Means in one dimension from the extremes on."""
    centres = torch.stack([values.min(), values.median(), values.max()])
    for _ in range(20):
        nearest = (values[:, None] - centres).abs().argmin(1)
        centres = torch.stack(
            [values[nearest == i].mean() if (nearest == i).any() else centres[i] for i in range(3)]
        )
    return nearest == centres.argmax()


def _heavy_hitters(name: str, heads: DecoderHeads, budgets: Sequence[int]) -> CacheMethod:
    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        return attended(query, key, value, scoring, unseen_by_h2o(query, key, scoring, budgets[index]))

    def cache_bytes(tokens: int) -> float:
        width = heads.head_dim + heads.value_head_dim
        return HALF * heads.num_kv_heads * width * sum(min(tokens, budget) for budget in budgets)

    setting = f"{sum(budgets) // len(budgets)} positions"
    return CacheMethod(name, setting, attend, cache_bytes)


def unseen_by_h2o(query: Tensor, key: Tensor, scoring: Scoring, budget: int) -> Tensor:
    """Which positions have been forgotten when each token attends: bool [1, G, S, S]."""
    tokens, groups = key.shape[2], key.shape[1]
    recent = max(1, budget // 2)
    products = query.float() @ per_query_head(key, query).transpose(2, 3)
    gone = torch.zeros(groups, tokens, dtype=torch.bool)
    unseen = torch.zeros(groups, tokens, tokens, dtype=torch.bool)
    given = torch.zeros(groups, tokens)
    group = query.shape[1] // groups
    for token in range(tokens):
        unseen[:, token, : token + 1] = gone[:, : token + 1]
        hidden = gone[:, : token + 1].repeat_interleave(group, 0)
        row = products[0, :, token : token + 1, : token + 1]
        weights = scoring.probabilities(row, token, unseen=hidden[:, None])
        given[:, : token + 1] += weights.reshape(groups, group, -1).sum(1)
        if token + 1 > budget:  # one more than fits when the next comes
            old = token + 1 - recent
            worth = given[:, :old].masked_fill(gone[:, :old], float("inf"))
            gone.scatter_(1, worth.argmin(1, keepdim=True), True)
    return unseen[None]


def duo(observed: Observed, share: float, recent: int) -> CacheMethod:
    """DuoAttention-style (arXiv 2410.10819): some heads see everything, others sinks and recent positions.

    DuoAttention learns which by gradient descent on passkeys; here those see everything whose attended values
    change most on calibration text when they do not. ``share`` of all KV heads see everything.
    """
    heads = observed.heads
    change = torch.stack([
        torch.stack([_streaming_change(window[layer], recent) for window in observed.layers]).sum(0)
        for layer in range(heads.num_layers)
    ])  # fmt: skip
    count = round(share * change.numel())
    full = torch.zeros(change.numel(), dtype=torch.bool)
    full[change.flatten().topk(count).indices] = True
    full = full.reshape(change.shape)

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        unseen = unseen_by_streaming(key.shape[2], recent) & ~full[index][:, None, None]
        return attended(query, key, value, scoring, unseen[None])

    def cache_bytes(tokens: int) -> float:
        streaming = min(tokens, SINKS + recent)
        rows = count * tokens + (change.numel() - count) * streaming
        return HALF * rows * (heads.head_dim + heads.value_head_dim)

    return CacheMethod("duo", f"{count} of {change.numel()} heads, {recent} recent", attend, cache_bytes)


def unseen_by_streaming(tokens: int, recent: int) -> Tensor:
    """Positions behind the last ``recent`` ones but the sinks: bool [1, S, S]."""
    position = torch.arange(tokens)
    return ((position[None, :] <= position[:, None] - recent) & (position[None, :] >= SINKS))[None]


def _streaming_change(seen: Seen, recent: int) -> Tensor:
    """[G]: squared change of what the query heads of a KV head attend to."""
    unseen = unseen_by_streaming(seen.key.shape[2], recent)[None]
    change = attended(seen.query, seen.key, seen.value, seen.scoring, unseen) - seen.out
    by_head: Tensor = change[0].square().sum((1, 2)).reshape(seen.key.shape[1], -1)
    return by_head.sum(1)
