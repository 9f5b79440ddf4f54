"""Sliding windows that hide nothing: plain causal attention, whatever else the layers of a family do."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from chai_export.errors import ChaiError
from chai_export.models.geometry import describe
from chai_export.models.oracle import require_same_with_all_heads
from chai_export.models.sliding import causal_mask, layer_kinds, window_of
from chai_export.models.support import require_supported, unsupported_reasons
from tests.helpers.exported import exported
from tests.helpers.families import family_config, family_model

WINDOWS = ("cohere2-window", "gemma3-window", "ministral-window", "mistral-window", "olmo3-window")


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_as_long_as_the_context_ends_the_positions(name):
    model = family_model(name)
    assert window_of(model.config) == 128
    assert unsupported_reasons(model.config) == []
    assert describe(model.config).max_positions == 128
    require_same_with_all_heads(model)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_shorter_than_the_context_is_refused(name):
    config = family_config(name, sliding_window=127)
    with pytest.raises(ChaiError, match="a sliding window of 127 tokens is smaller than the context of 128"):
        require_supported(config)


def test_layers_are_left_as_they_are():
    """Cohere 2 rotates queries and keys in its sliding layers only."""
    config = family_model("cohere2-window").config
    assert layer_kinds(config) == ["sliding_attention"] * 2
    assert config.sliding_window == 128


def test_no_window_is_left_in_the_graph():
    constants = [
        tensor.numpy().item()
        for value in ir.load(exported("cohere2-window")).graph.initializers.values()
        if (tensor := value.const_value) is not None and tensor.size == 1
    ]
    assert not {128, -128, 127, -127} & set(constants)


def seen(config, window: int, tokens: int, **options) -> torch.Tensor:
    """Who sees whom among ``tokens`` tokens after a past of one."""
    from transformers.masking_utils import sliding_window_causal_mask_function as sliding

    return causal_mask(
        config=config, batch_size=1, q_length=tokens, kv_length=tokens + 1, q_offset=1,
        mask_function=sliding(window), local_size=window, allow_is_causal_skip=False, **options,
    )[0, 0]  # fmt: skip


def test_only_windows_that_hide_nothing_are_left_out():
    config = family_config("mistral-window", max_position_embeddings=4)
    plain = torch.ones(6, 7, dtype=torch.bool).tril(1)
    assert (seen(config, 4, 6) == plain).all()
    assert not (seen(config, 3, 6) == plain).all()
    assert not (seen(config, 4, 6, use_vmap=True) == plain).all(), "what a model adds to its mask is lost"
