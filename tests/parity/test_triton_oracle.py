"""The oracle gives the same logits and head maps through the Triton kernels as through torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chai_export.models import oracle as oracle_module
from chai_export.models.fused_attention import kernels_available
from chai_export.models.oracle import Oracle
from tests.helpers.families import family_model


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa"])
def test_kernels_give_the_oracles_logits_and_maps(name, monkeypatch):
    calls = []
    fused = oracle_module.fresh_prefill
    monkeypatch.setattr(oracle_module, "fresh_prefill", lambda *a: calls.append(a) or fused(*a))
    model = family_model(name)
    tokens = np.random.default_rng(1).integers(3, model.config.vocab_size, 12).tolist()
    plain, kernels = Oracle(model, [1, 2]), Oracle(model, [1, 2], kernels=True)
    expected = plain.logits(tokens)
    np.testing.assert_allclose(kernels.logits(tokens), expected, atol=2e-5)
    assert (kernels.head_maps == plain.head_maps).all()
    assert len(calls) == 2
    kernels.logits(tokens, plain.head_maps)  # given maps are not the kernels' business
    assert len(calls) == 2


def test_kernels_are_chosen_by_themselves_only_on_a_gpu():
    assert not kernels_available(torch.device("cpu"))
    assert kernels_available(torch.device("cuda"))
