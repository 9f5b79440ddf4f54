"""Each method of the scoreboard against its paper's definition, token by token, on a small case."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from chai_export.errors import ChaiError
from chai_export.models.scoring import Scoring
from chai_export.op.heads import DecoderHeads
from chai_export.quality.scoreboard import evicted, pruned, quantised
from chai_export.quality.scoreboard.method import float16_bytes
from chai_export.quality.scoreboard.observed import Observed, Seen, rotated, unrotated

HEADS, GROUPS, DIM, TOKENS = 4, 2, 8, 24
GROUP = HEADS // GROUPS
SCORING = Scoring(DIM**-0.5)


def heads(kv_heads: int = GROUPS, layers: int = 1) -> DecoderHeads:
    return DecoderHeads(
        num_layers=layers, num_query_heads=HEADS, num_kv_heads=kv_heads, head_dim=DIM, value_head_dim=DIM,
        kv_source_layers=None,
    )  # fmt: skip


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    return (
        torch.randn(1, HEADS, TOKENS, DIM),
        torch.randn(1, GROUPS, TOKENS, DIM),
        torch.randn(1, GROUPS, TOKENS, DIM),
    )


def step(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """One token of one head on n rows: its weights and what it attends to."""
    weights = torch.softmax(keys @ query * SCORING.scale, dim=0)
    return weights, weights @ values


def seen(query: Tensor, key: Tensor, value: Tensor) -> Seen:
    out = torch.zeros(1, HEADS, key.shape[2], DIM)
    for head in range(HEADS):
        for token in range(key.shape[2]):
            kv = head // (HEADS // key.shape[1])
            out[0, head, token] = step(
                query[0, head, token], key[0, kv, : token + 1], value[0, kv, : token + 1]
            )[1]
    return Seen(query, key, value, SCORING, out)


def quantise(numbers: Tensor, bits: int) -> Tensor:
    low = numbers.min().half().float()
    scale = ((numbers.max() - low) / (2**bits - 1)).half().float()
    return ((numbers - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def test_kivi_is_the_cache_that_its_paper_grows_token_by_token(rows):
    query, key, value = rows
    group, residual, bits = 4, 8, 2
    found = quantised.kivi(heads(), bits, group, residual).attend(0, query, key, value, SCORING)
    for head in range(HEADS):
        kv = head // GROUP
        for token in range(TOKENS):
            length = token + 1
            keys, values = key[0, kv, :length].clone(), value[0, kv, :length].clone()
            for first in range(0, length // residual * residual, group):  # whole residuals are flushed
                for channel in range(DIM):
                    keys[first : first + group, channel] = quantise(
                        key[0, kv, first : first + group, channel], bits
                    )
            for old in range(max(0, length - residual)):
                for first in range(0, DIM, group):
                    values[old, first : first + group] = quantise(
                        value[0, kv, old, first : first + group], bits
                    )
            _, expected = step(query[0, head, token], keys, values)
            torch.testing.assert_close(found[0, head, token], expected, rtol=1e-4, atol=1e-5)


def test_kivi_s_bytes_count_scales_and_the_residual():
    # 100 tokens: 4 keys and 32 values are exact; a number takes 2 bits and its share of 4 bytes for 32.
    method = quantised.kivi(heads(layers=3), 2, 32, 32)
    coded, exact = 2 / 8 + 4 / 32, 2
    by_hand = 3 * GROUPS * DIM * (96 * coded + 4 * exact + 68 * coded + 32 * exact)
    assert method.cache_bytes(100) == pytest.approx(by_hand)


def rotation(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.02])
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def test_keys_are_turned_as_transformers_turns_them_and_back(rows):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    _, key, _ = rows
    cos, sin = rotation()
    expected, _ = apply_rotary_pos_emb(key, key, cos[None], sin[None])
    torch.testing.assert_close(rotated(key, (cos, sin)), expected)
    torch.testing.assert_close(unrotated(expected, (cos, sin)), key)


def test_kvquant_keeps_outliers_and_uses_channel_ranges_from_calibration_before_positions(rows):
    query, key, value = rows
    turn = rotation()
    key = key.clone()
    key[0, 0, 5, 2] = 40.0  # an outlier in its channel
    turned = rotated(key, turn)
    observed = Observed(heads(), ((seen(query, turned, value),),), (), turn)
    exact = seen(query, turned, value).out
    errors = {}
    for bits in (2, 4, 8):
        method = quantised.kvquant(observed, bits)
        found = method.attend(0, query, turned, value, SCORING)
        errors[bits] = float((found - exact).abs().mean())
    assert errors[8] < 0.1 * errors[4] < 0.1 * errors[2]
    # Without its outliers apart the channel's range would be thirty times as wide.
    ranges = torch.quantile(key[0], torch.tensor([0.005, 0.995]), dim=1)
    assert ranges[1, 0, 2] < 40
    numbers = GROUPS * DIM * 2
    per_token = numbers * (3 / 8 + 0.01 * 4) + 4
    assert quantised.kvquant(observed, 3).cache_bytes(10) == pytest.approx(10 * per_token)


def test_kvquant_s_levels_are_the_means_of_what_is_nearest_to_them():
    torch.manual_seed(0)
    numbers = (0.1 * torch.randn(2000) + 0.4).clamp(0, 1)
    levels = quantised._levels(numbers, 2)
    nearest = (numbers[:, None] - levels).abs().argmin(dim=1)
    means = torch.stack([numbers[nearest == i].mean() for i in range(4)])
    torch.testing.assert_close(levels, means, rtol=0, atol=0.01)
    even = (torch.arange(4) + 0.5) / 4
    loss = [(numbers[:, None] - points).abs().amin(dim=1).square().mean() for points in (levels, even)]
    assert loss[0] < loss[1] / 2


def test_h2o_forgets_as_its_paper_does_token_by_token(rows):
    query, key, value = rows
    budget = 8
    found = evicted.h2o(heads(), budget).attend(0, query, key, value, SCORING)
    for kv in range(GROUPS):
        cached, given = [], {}
        for token in range(TOKENS):
            cached.append(token)
            given[token] = 0.0
            for head in range(kv * GROUP, (kv + 1) * GROUP):
                weights, out = step(query[0, head, token], key[0, kv, cached], value[0, kv, cached])
                torch.testing.assert_close(found[0, head, token], out, rtol=1e-4, atol=1e-5)
                for position, weight in zip(cached, weights.tolist(), strict=True):
                    given[position] += weight
            if len(cached) > budget:
                old = [position for position in cached if position <= token - budget // 2]
                cached.remove(min(old, key=lambda position: given[position]))
    method = evicted.h2o(heads(), budget)
    assert method.cache_bytes(TOKENS) == float16_bytes(heads(), budget)
    assert method.cache_bytes(3) == float16_bytes(heads(), 3)


def test_h2o_counts_the_weights_that_the_layer_gives(rows):
    """A layer with a window gives none to what lies behind it, which is then forgotten first."""
    query, key, _ = rows
    windowed = Scoring(DIM**-0.5, window=3)
    gone = evicted.unseen_by_h2o(query, key, windowed, 8)[0, :, -1]
    plain = evicted.unseen_by_h2o(query, key, SCORING, 8)[0, :, -1]
    assert not gone[:, -4:].any()
    assert gone.sum() == plain.sum()
    assert (gone != plain).any()


def test_streaming_heads_see_sinks_and_the_last_positions():
    unseen = evicted.unseen_by_streaming(8, 2)[0]
    assert [i for i in range(8) if not unseen[7, i]] == [0, 1, 2, 3, 6, 7]
    assert not unseen[4, :5].any()


def test_duo_s_full_heads_are_those_that_streaming_changes_most(rows):
    query, key, value = rows
    value = value.clone()
    value[:, 1] = 1.0  # whatever this KV head sees, it attends to the same
    observed = Observed(heads(), ((seen(query, key, value),),), (), None)
    method = evicted.duo(observed, 0.5, 4)
    found = method.attend(0, query, key, value, SCORING)
    exact = observed.layers[0][0].out
    torch.testing.assert_close(found[:, :GROUP], exact[:, :GROUP], rtol=1e-4, atol=1e-5)
    streaming = evicted.duo(observed, 0.0, 4).attend(0, query, key, value, SCORING)
    assert not torch.allclose(streaming[:, :GROUP], exact[:, :GROUP], atol=1e-3)
    assert method.cache_bytes(20) == float16_bytes(heads(1), 20) + float16_bytes(heads(1), 8)


def test_squeeze_gives_what_idle_layers_give_up_to_the_others():
    similarity = (0.99, 0.5, 0.52, 0.985, 0.8)
    observed = Observed(heads(layers=5), (), similarity, None)
    method = evicted.squeeze(observed, 10, least=0.3)
    # Layers 0 and 3 keep 3 of 10 positions; their 14 go to the three others in equal parts.
    assert method.cache_bytes(1000) == float16_bytes(heads(), 2 * 3 + 3 * round(10 + 14 / 3))
    with pytest.raises(ChaiError, match="SqueezeAttention needs"):
        evicted.squeeze(Observed(heads(), (), (), None), 10)


def test_think_keeps_the_channels_with_the_largest_product_of_norms(rows):
    query, key, value = rows
    key = key.clone()
    key[0, :, :, 3] *= 20
    key[0, :, :, 6] *= 10
    prompt, recent = 6, 2
    found = pruned.think(heads(), 0.25, prompt, recent).attend(0, query, key, value, SCORING)
    for head in range(HEADS):
        kv = head // GROUP
        own = query[0, kv * GROUP : (kv + 1) * GROUP, :prompt]
        norms = [
            float(own[..., i].square().sum().sqrt() * key[0, kv, :prompt, i].square().sum().sqrt())
            for i in range(DIM)
        ]
        kept = np.argsort(norms)[-2:]
        for token in range(TOKENS):
            keys = key[0, kv, : token + 1].clone()
            if token >= prompt:
                thin = torch.zeros_like(keys)
                thin[:, kept] = keys[:, kept]
                keys[: token + 1 - recent] = thin[: token + 1 - recent]
            _, expected = step(query[0, head, token], keys, value[0, kv, : token + 1])
            torch.testing.assert_close(found[0, head, token], expected, rtol=1e-4, atol=1e-5)
    rows_of_keys = 20 * 2 + 4 * DIM  # of 24 tokens with 4 recent ones
    by_hand = GROUPS * (2 * (rows_of_keys + 24 * DIM) + DIM / 8)
    assert pruned.think(heads(), 0.25, 6, 4).cache_bytes(24) == by_hand


def test_slim_s_values_follow_from_keys(rows):
    torch.manual_seed(0)
    width = HEADS * DIM
    hidden, w_k, w_v = torch.randn(TOKENS, width), torch.randn(width, width), torch.randn(width, width)
    keys, values = hidden.double() @ w_k.double(), hidden.double() @ w_v.double()
    torch.testing.assert_close(keys @ torch.linalg.inv(w_k.double()) @ w_v.double(), values)
    of_heads = heads(HEADS)
    method = pruned.slim(Observed(of_heads, (), (), None), width)
    assert method.cache_bytes(10) == float16_bytes(of_heads, 10) / 2
    query, _, _ = rows
    many = torch.randn(1, HEADS, TOKENS, DIM), torch.randn(1, HEADS, TOKENS, DIM)
    torch.testing.assert_close(
        method.attend(0, query, *many, SCORING), seen(query, *many).out, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ChaiError, match="multi-head attention"):
        pruned.slim(Observed(heads(), (), (), None), width)


def test_the_heads_that_contribute_least_are_left_out(rows):
    query, key, value = rows
    value = value.clone()
    value[:, 0] *= 0.01
    observed = Observed(heads(), ((seen(query, key, value),),), (), None)
    method = pruned.deja_vu(observed, 0.5)
    found = method.attend(0, query, key, value, SCORING)
    assert not found[:, :GROUP].any()
    torch.testing.assert_close(found[:, GROUP:], observed.layers[0][0].out[:, GROUP:], rtol=1e-4, atol=1e-5)
    assert method.cache_bytes(10) == float16_bytes(heads(), 10) / 2


def test_spatten_s_heads_stay_out_in_all_later_layers():
    layers = 4
    of_heads = heads(HEADS, layers)

    def importance(by_head: list[float]) -> Seen:
        out = torch.tensor(by_head)[None, :, None, None].expand(1, HEADS, 1, 1)
        return Seen(out, out, out, SCORING, out)

    # Head 3 is the least by far in layer 0 and the largest afterwards: sums over layers decide.
    window = tuple(
        importance(by_head) for by_head in ([5, 4, 3, 1], [1, 1, 1, 3], [1, 1, 1, 9], [1, 1, 1, 9])
    )
    method = pruned.spatten(Observed(of_heads, (window,), (), None), 0.625)
    ones = torch.ones(1, HEADS, 2, DIM)
    alive = [
        [head for head in range(HEADS) if method.attend(i, ones, ones, ones, SCORING)[0, head].any()]
        for i in range(layers)
    ]
    assert alive == [[0, 1, 2], [0, 1], [0, 1], [0]]
    assert method.cache_bytes(10) == float16_bytes(of_heads, 10) * 8 / 16


def test_chai_qkv_shares_the_values_of_the_representative(rows):
    query, key, value = rows
    of_heads = heads()
    probe = 4
    method = pruned.chai_qkv(of_heads, (1,), probe)
    found = method.attend(0, query, key, value, SCORING)
    exact = seen(query, key, value).out
    torch.testing.assert_close(found[:, :, :probe], exact[:, :, :probe], rtol=1e-4, atol=1e-5)
    later = found[0, :, probe:]
    # One KV head is left: every head attends as one of its two query heads does, to that head's values.
    both = [exact[0, i, probe:] for i in range(HEADS)]
    kept = {i for i in range(HEADS) for head in later if torch.allclose(head, both[i], atol=1e-4)}
    assert kept <= {0, 1} or kept <= {2, 3}
    assert all(any(torch.allclose(head, both[i], atol=1e-4) for i in kept) for head in later)
    assert method.cache_bytes(10) == float16_bytes(of_heads, 10) / 2
