"""Methods that leave out parts of rows or of heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chai_export.errors import ChaiError
from chai_export.models.attention import probe_probabilities
from chai_export.models.oracle import clustered_attention, op_head_map
from chai_export.models.scoring import Scoring
from chai_export.op.heads import DecoderHeads
from chai_export.quality.scoreboard.method import HALF, CacheMethod, attended, weights
from chai_export.quality.scoreboard.observed import Observed


def chai_qkv(heads: DecoderHeads, kept: Sequence[int], probe_tokens: int) -> CacheMethod:
    """CHAI-QKV (arXiv 2403.08058, section 4.4): a cluster shares its representative's values too."""

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        probe = probe_probabilities(query, key, scoring, min(probe_tokens, query.shape[2]))
        head_map = torch.from_numpy(op_head_map(probe[0].numpy(), key.shape[1], kept[index])).long()
        group = query.shape[1] // key.shape[1]
        shared = value[:, head_map // group]
        exact = min(probe_tokens, query.shape[2])
        own = value.repeat_interleave(group, dim=1)
        # The exact first tokens use their own values, all others those of the representative.
        keys = key.repeat_interleave(group, dim=1)
        first = clustered_attention(
            query[:, :, :exact], keys[:, :, :exact], own[:, :, :exact],
            torch.arange(query.shape[1]), scoring, exact,
        )  # fmt: skip
        rest = clustered_attention(query, keys, shared, head_map, scoring, 0)
        return torch.cat([first, rest[:, :, exact:]], dim=2)

    def cache_bytes(tokens: int) -> float:
        return HALF * tokens * sum(kept) * (heads.head_dim + heads.value_head_dim)

    return CacheMethod("chai-qkv", f"{sum(kept)} heads", attend, cache_bytes)


def deja_vu(observed: Observed, share: float) -> CacheMethod:
    """DejaVu-style (arXiv 2310.17157): in every layer the heads that contribute least are left out.

    DejaVu predicts for each token which heads matter and so saves no cache; as in the comparison of CHAI's
    paper heads are left out for good here, those with the smallest attended values on calibration text.
    """
    heads = observed.heads
    count = max(1, round(share * heads.num_kv_heads))
    kept = [importance.topk(count).indices for importance in _importance(observed)]
    return _without_heads("deja-vu", heads, kept)


def spatten(observed: Observed, share: float) -> CacheMethod:
    """SpAtten-style (arXiv 2012.09852, section III-B): cascade pruning of heads by cumulative importance.

    A head's importance is the sum of the magnitudes of its attended values, added up over layers; what is
    left out in a layer is left out in all that follow. Heads go one after the other, evenly over the layers.
    """
    heads = observed.heads
    most, layers = heads.num_kv_heads, heads.num_layers
    last = max(1, min(most, round(2 * share * most - most)))  # a ramp from all heads to these has the share
    total = torch.zeros(most)
    alive = torch.arange(most)
    kept = []
    for layer, importance in enumerate(_importance(observed)):
        total += importance
        count = min(len(alive), max(1, round(most + (last - most) * (layer + 1) / layers)))
        alive = alive[total[alive].topk(count).indices].sort().values
        kept.append(alive)
    return _without_heads("spatten", heads, kept)


def _importance(observed: Observed) -> list[Tensor]:
    """By layer [G]: magnitudes of what the query heads of each KV head attend to."""
    group = observed.heads.group
    return [
        torch.stack([window[layer].out[0].abs().sum((1, 2)).reshape(-1, group).sum(1)
                     for window in observed.layers]).sum(0)
        for layer in range(observed.heads.num_layers)
    ]  # fmt: skip


def _without_heads(name: str, heads: DecoderHeads, kept: Sequence[Tensor]) -> CacheMethod:
    masks = []
    for indices in kept:
        mask = torch.zeros(heads.num_kv_heads)
        mask[indices] = 1.0
        masks.append(mask.repeat_interleave(heads.group)[None, :, None, None])
    rows = sum(len(indices) for indices in kept)

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        return attended(query, key, value, scoring) * masks[index]

    def cache_bytes(tokens: int) -> float:
        return HALF * tokens * rows * (heads.head_dim + heads.value_head_dim)

    return CacheMethod(name, f"{rows} of {heads.num_layers * heads.num_kv_heads} heads", attend, cache_bytes)


def think(heads: DecoderHeads, share: float, prompt: int = 128, recent: int = 32) -> CacheMethod:
    """ThinK (arXiv 2407.21018): channels of keys are left out where the queries do not look.

    Of each KV head the channels with the largest |Q_i|·|K_i| (Frobenius norms over the prompt) are kept. The
    prompt itself attends exactly, and the last ``recent`` keys are whole.
    """
    kept = max(1, round(share * heads.head_dim))

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        del index
        tokens = key.shape[2]
        begin = min(prompt, tokens)
        by_head = query[:, :, :begin].float().reshape(1, key.shape[1], -1, begin, query.shape[3])
        criterion = by_head.square().sum((2, 3)).sqrt() * key[:, :, :begin].float().square().sum(2).sqrt()
        mask = torch.zeros_like(criterion).scatter_(-1, criterion.topk(kept, dim=-1).indices, 1.0)
        position = torch.arange(tokens)
        near = position[None, :] > position[:, None] - recent
        exact = near | (position[:, None] < begin)
        group = query.shape[1] // key.shape[1]
        whole = query.float() @ key.float().repeat_interleave(group, 1).transpose(2, 3)
        thin = query.float() @ (key * mask[:, :, None]).float().repeat_interleave(group, 1).transpose(2, 3)
        probabilities = scoring.probabilities(torch.where(exact, whole, thin), 0)
        return probabilities @ value.float().repeat_interleave(group, 1)

    def cache_bytes(tokens: int) -> float:
        keys = (tokens - min(tokens, recent)) * kept + min(tokens, recent) * heads.head_dim
        numbers = keys + tokens * heads.value_head_dim
        return heads.num_layers * heads.num_kv_heads * (HALF * numbers + heads.head_dim / 8)

    return CacheMethod("think", f"{kept} of {heads.head_dim} channels", attend, cache_bytes)


def slim(observed: Observed, hidden_size: int) -> CacheMethod:
    """Slim attention (arXiv 2503.05840): values are computed from keys, exactly; only keys are cached.

    V = K·W_K⁻¹·W_V needs a square, invertible W_K: as many KV heads as query heads that fill the residual
    stream, and keys cached before rotary positions.

    Raises:
        ChaiError: the model has no such projection.
    """
    heads = observed.heads
    width = heads.num_kv_heads * heads.head_dim
    if heads.group != 1 or width != hidden_size:
        raise ChaiError("Slim attention needs multi-head attention whose heads fill the residual stream")

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        del index
        return weights(query, key, scoring) @ value.float()

    def cache_bytes(tokens: int) -> float:
        return HALF * tokens * heads.num_layers * heads.num_kv_heads * heads.head_dim

    return CacheMethod("slim", "keys only", attend, cache_bytes)


def least_share(heads: DecoderHeads) -> float:
    """Of float16's bytes that methods which share keys but keep all values can reach."""
    keys = heads.head_dim / (heads.head_dim + heads.value_head_dim)
    return 1 - keys + keys / heads.num_kv_heads
