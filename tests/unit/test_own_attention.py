"""Families with attention code of their own: which masks pass, and what one KV head leaves to share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chai_export.clustering.calibrate import calibrate
from chai_export.errors import ChaiError
from chai_export.models.attention import attention_of
from chai_export.models.own_attention import visible_window
from tests.helpers.families import family_model

PAST_ONLY = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
CHUNKS = PAST_ONLY & (torch.arange(4)[:, None] // 2 == torch.arange(4) // 2)


def additive(seen: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, hidden)


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (PAST_ONLY, 4),
        (additive(PAST_ONLY, torch.finfo(torch.float32).min), 4),
        (additive(PAST_ONLY, float("-inf")), 4),
        (additive(PAST_ONLY, -5.0), None),
        (PAST_ONLY & torch.ones(4, 4, dtype=torch.bool).triu(-1), 2),
        (additive(PAST_ONLY & torch.ones(4, 4, dtype=torch.bool).triu(-2), float("-inf")), 3),
        (CHUNKS, None),
        (PAST_ONLY & (torch.arange(4) != 1), None),
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), None),
        (additive(PAST_ONLY, float("-inf")) + 0.5 * PAST_ONLY, None),
        (torch.ones(1, 1, 4, 6, dtype=torch.bool).tril(), None),
    ],
    ids=[
        "bool", "lowest", "infinite", "weak", "window", "window of 3", "chunks", "padding", "no mask", "bias",
        "other columns",
    ],
)  # fmt: skip
def test_only_a_causal_mask_with_a_window_passes(mask: torch.Tensor, seen: int | None) -> None:
    assert visible_window(mask) == seen


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
