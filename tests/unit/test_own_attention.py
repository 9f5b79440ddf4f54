"""Families with attention code of their own: which masks pass, and what one KV head leaves to share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chai_export.clustering.calibrate import calibrate
from chai_export.errors import ChaiError
from chai_export.models.attention import attention_of
from chai_export.models.own_attention import hides_the_future_only
from tests.helpers.families import family_model

PAST_ONLY = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()


def additive(seen: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, hidden)


@pytest.mark.parametrize(
    ("mask", "plain"),
    [
        (PAST_ONLY, True),
        (additive(PAST_ONLY, torch.finfo(torch.float32).min), True),
        (additive(PAST_ONLY, float("-inf")), True),
        (additive(PAST_ONLY, -5.0), False),
        (PAST_ONLY & torch.ones(4, 4, dtype=torch.bool).triu(-1), False),
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), False),
        (additive(PAST_ONLY, float("-inf")) + 0.5 * PAST_ONLY, False),
        (torch.ones(1, 1, 4, 6, dtype=torch.bool).tril(), False),
    ],
    ids=["bool", "lowest", "infinite", "weak", "window", "no mask", "bias", "other columns"],
)
def test_only_a_causal_mask_passes(mask: torch.Tensor, plain: bool) -> None:
    assert hides_the_future_only(mask) is plain


@pytest.mark.parametrize("name", ["gptj", "falcon-gqa"])
def test_padding_is_refused(name: str) -> None:
    model = family_model(name)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])

    def layer(index: int, query: torch.Tensor, *rest: object) -> torch.Tensor:
        raise AssertionError("reached")

    refused = pytest.raises(ChaiError, match="layer 0: its attention mask is not causal")
    with refused, attention_of(model, layer), torch.inference_mode():
        model(input_ids=torch.arange(6)[None], attention_mask=mask, use_cache=False)
    assert model(input_ids=torch.arange(6)[None]).logits.shape == (1, 6, 96)


def test_one_kv_head_leaves_nothing_to_share(capsys: pytest.CaptureFixture[str]) -> None:
    model = family_model("falcon-mqa")
    tokens = np.random.default_rng(0).integers(3, 96, 400)
    clusters = calibrate(model, tokens, keep="elbow", samples=2, seq_len=64, probe_tokens=5)
    assert clusters.kept_heads == (1, 1)
    assert "one KV head per layer (multi-query attention): nothing to share" in capsys.readouterr().err
    with pytest.raises(ChaiError, match="out of reach"):
        calibrate(model, tokens, keep="budget:0.1")
