"""Methods that store every row in fewer bits than float16, other than the op's own."""

from __future__ import annotations

import torch
from torch import Tensor

from chai_export.models.scoring import Scoring
from chai_export.op.heads import DecoderHeads
from chai_export.quality.scoreboard.method import HALF, CacheMethod, asymmetric, per_query_head, weights
from chai_export.quality.scoreboard.observed import Observed, rotated, unrotated

_INDEX = 2
"""Bytes of an outlier's place."""


def kivi(heads: DecoderHeads, bits: int, group: int = 32, residual: int = 128) -> CacheMethod:
    """KIVI (arXiv 2402.02750): keys per channel of a group of tokens, values per token and group of channels.

    Asymmetric, scale and minimum in float16. The last n mod ``residual`` keys, and the last ``residual``
    values, of n are float16.
    """

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        del index
        tokens = key.shape[2]
        coded = _per_channel(key.float(), bits, group)
        kept = _by_groups(value.float(), bits, group)
        length = torch.arange(1, tokens + 1)[:, None]
        position = torch.arange(tokens)[None, :]
        exact_key, exact_value = position >= length - length % residual, position >= length - residual
        exact, read = (query.float() @ per_query_head(rows, query).transpose(2, 3) for rows in (key, coded))
        probabilities = scoring.probabilities(torch.where(exact_key, exact, read), 0)
        return (probabilities * exact_value) @ per_query_head(value, query) + (
            probabilities * ~exact_value
        ) @ per_query_head(kept, query)

    def cache_bytes(tokens: int) -> float:
        exact_keys = tokens % residual
        exact_values = min(tokens, residual)
        key_width, value_width = heads.head_dim, heads.value_head_dim
        keys = (tokens - exact_keys) * key_width * (bits / 8 + 2 * HALF / group)
        values = (tokens - exact_values) * value_width * (bits / 8 + 2 * HALF / group)
        exact = HALF * (exact_keys * key_width + exact_values * value_width)
        return heads.num_layers * heads.num_kv_heads * (keys + values + exact)

    return CacheMethod("kivi", f"{bits} bits, residual {residual}", attend, cache_bytes)


def _per_channel(rows: Tensor, bits: int, group: int) -> Tensor:
    """Each channel of each group of tokens; a last group that is not full is left alone."""
    whole = rows.shape[2] // group * group
    grouped = rows[:, :, :whole].reshape(*rows.shape[:2], -1, group, rows.shape[3])
    return torch.cat([asymmetric(grouped, bits, 3).flatten(2, 3), rows[:, :, whole:]], dim=2)


def _by_groups(rows: Tensor, bits: int, group: int) -> Tensor:
    return asymmetric(rows.reshape(*rows.shape[:-1], -1, group), bits, -1).flatten(-2)


def kvquant(observed: Observed, bits: int, outliers: float = 0.01) -> CacheMethod:
    """KVQuant (arXiv 2401.18079): keys per channel before rotary positions, values per token, outliers apart.

    Ranges of channels, and the 2^bits levels of each layer, which are not evenly spaced, come from
    calibration text; ranges of values from their own token. The share ``outliers`` that lies outside stays
    float16 with its place. Keys of models whose rotary positions are unknown are quantised as they are
    cached.
    """
    heads, turn = observed.heads, observed.rotation
    share = torch.tensor([outliers / 2, 1 - outliers / 2])

    def before_positions(rows: Tensor) -> Tensor:
        return rows.float() if turn is None else unrotated(rows.float(), turn)

    ranges, key_levels, value_levels = [], [], []
    for layer in range(heads.num_layers):
        keys = torch.cat([before_positions(window[layer].key) for window in observed.layers], dim=2)
        low, high = torch.quantile(keys[0, :, :4096], share, dim=1)[:, None, :, None]
        ranges.append((low, high))
        key_levels.append(_levels(_inside(keys, low, high), bits))
        values = torch.cat([window[layer].value.float() for window in observed.layers], dim=2)
        key_low, key_high = _token_range(values, share)
        value_levels.append(_levels(_inside(values, key_low, key_high), bits))

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        keys = _with_outliers(before_positions(key), *ranges[index], key_levels[index])
        if turn is not None:
            keys = rotated(keys, turn)
        values = _with_outliers(value.float(), *_token_range(value.float(), share), value_levels[index])
        return weights(query, keys, scoring) @ per_query_head(values, query)

    def cache_bytes(tokens: int) -> float:
        numbers = heads.num_kv_heads * (heads.head_dim + heads.value_head_dim)
        per_token = numbers * (bits / 8 + outliers * (HALF + _INDEX)) + 2 * HALF
        return tokens * heads.num_layers * per_token

    return CacheMethod("kvquant", f"{bits} bits, {outliers:.0%} outliers", attend, cache_bytes)


def _token_range(rows: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Of all heads of a token: [1, 1, S, 1] twice."""
    together = rows.transpose(1, 2).flatten(2)
    low, high = torch.quantile(together, share, dim=2)
    return low[:, None, :, None], high[:, None, :, None]


def _inside(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The numbers within their range, as shares of it."""
    scaled = (rows - low) / (high - low).clamp_min(1e-12)
    return scaled[(scaled >= 0) & (scaled <= 1)]


def _levels(numbers: Tensor, bits: int, rounds: int = 12) -> Tensor:
    """Where 2^bits levels lie best for some numbers in 0 … 1: K-Means in one dimension, from quantiles on."""
    sample = numbers[:: max(1, len(numbers) // 20000)].contiguous()
    levels = torch.quantile(sample, (torch.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(rounds):
        nearest = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros_like(levels).index_add_(0, nearest, sample)
        counts = torch.bincount(nearest, minlength=len(levels))
        levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels)
    return levels


def _with_outliers(rows: Tensor, low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
    scaled = (rows - low) / (high - low).clamp_min(1e-12)
    coded = levels[torch.bucketize(scaled.contiguous(), (levels[1:] + levels[:-1]) / 2)]
    outside = (scaled < 0) | (scaled > 1)
    return torch.where(outside, rows.half().float(), coded * (high - low) + low)
