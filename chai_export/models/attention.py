"""The op as an attention function of transformers: any family that follows its interface runs through it.

Families that do not follow it are brought here by :mod:`chai_export.models.own_attention`.

Registered under the name "chai" with ``AttentionInterface`` (called with the query heads and the KV heads
of a layer, after RoPE, KV heads not yet repeated) and with ``AttentionMaskInterface`` (the mask is then
None exactly when it is causal and nothing else, so any other is looked at: a window passes, no more does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chai_export.errors import ChaiError
from chai_export.models.families import Attention, family_of
from chai_export.models.own_attention import redirected, visible_window
from chai_export.models.quiet import quiet
from chai_export.models.scoring import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "chai"
LayerFunction = Callable[[int, Tensor, Tensor, Tensor, Scoring], Tensor]
"""(layer, query [B,H,S,D], key [B,G,S,D], value [B,G,S,Dv], scoring) -> attended values [B,H,S,Dv]."""

_QUERY_BLOCK = 256
# What a family passes when its scores are more than a Scoring says.
_FOREIGN_TERMS = ("position_bias", "alibi", "sinks")


class _Run:
    """One forward pass: the layer function and which layer comes next."""

    def __init__(self, function: LayerFunction, layers: int) -> None:
        self.function = function
        self.layers = layers
        self.layers_seen = 0


_ACTIVE: ContextVar[_Run | None] = ContextVar("chai_attention_run", default=None)


@contextmanager
def attention_of(model: PreTrainedModel, function: LayerFunction) -> Iterator[None]:
    """Let ``model`` compute its attention with ``function`` inside the block (one forward pass).

    Raises:
        ChaiError: a layer's attention did not come here, or its scores have terms
            that the op does not know (a mask that is not causal with a window, a bias).
    """
    run = _Run(function, model.config.num_hidden_layers)
    token = _ACTIVE.set(run)
    own = family_of(model.config.model_type).attention is not Attention.INTERFACE
    way = redirected(model, _attend) if own else _interface(model)
    try:
        with way:
            yield
        if run.layers_seen != run.layers:
            raise ChaiError(
                f"only {run.layers_seen} of the {run.layers} layers of this {model.config.model_type} model "
                "compute attention through transformers' attention interface; the others cannot be clustered"
            )
    finally:
        _ACTIVE.reset(token)


@contextmanager
def _interface(model: PreTrainedModel) -> Iterator[None]:
    """Set transformers' attention function of this model to ours, and back."""
    _register()
    before = model.config._attn_implementation
    try:
        with quiet():
            model.set_attn_implementation(NAME)
        yield
    finally:
        with quiet():
            model.set_attn_implementation(before)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Exact causal attention of heads against as many keys and values, in float32, block by block.

    Args:
        query: [B, H, S, D].
        key: [B, H, S, D].
        value: [B, H, S, Dv].
        scoring: what becomes of query·key.

    Returns:
        float32 [B, H, S, Dv]. Peak memory grows with S, not with S squared.
    """
    tokens = query.shape[2]
    keys, values = key.float().transpose(2, 3), value.float()
    blocks = []
    for start in range(0, tokens, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, tokens)
        first = scoring.first_visible(start)
        products = query[:, :, start:end].float() @ keys[..., first:end]
        blocks.append(scoring.probabilities(products, start, first) @ values[:, :, first:end])
    return torch.cat(blocks, dim=2)


def probe_probabilities(query: Tensor, key: Tensor, scoring: Scoring, tokens: int) -> Tensor:
    """Causal probabilities of the first ``tokens`` tokens of every head, float32 [B, H, t, t].

    Args:
        query: [B, H, S, D], after RoPE.
        key: [B, G, S, D], H a multiple of G.
        scoring: what becomes of query·key.
        tokens: t, at most S.
    """
    group = query.shape[1] // key.shape[1]
    keys = key[:, :, :tokens].float().repeat_interleave(group, dim=1)
    return scoring.probabilities(query[:, :, :tokens].float() @ keys.transpose(2, 3), 0)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **terms: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention; returns [B, S, H, Dv]."""
    for name in _FOREIGN_TERMS:
        if terms.get(name) is not None:
            layer = _active().layers_seen
            raise ChaiError(f"layer {layer}: its attention uses {name}, which the op cannot express")
    scoring = Scoring(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=int(terms.get("sliding_window") or 0),
        softcap=float(terms.get("softcap") or 0.0),
        sinks=terms.get("s_aux"),
    )
    attended = _attend(query, key, value, attention_mask, scoring)
    return attended.to(query.dtype).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """The layer function of the pass under way on its next layer; returns [B, H, S, Dv]."""
    run = _active()
    layer = run.layers_seen
    run.layers_seen += 1
    if layer >= run.layers:
        raise ChaiError("its layers compute attention more than once each, which the op cannot express")
    tokens = query.shape[2]
    # A mask decides what a layer sees, also where its window is told beside it.
    seen = tokens if mask is None else visible_window(mask)
    if seen is None or tokens != key.shape[2]:
        raise ChaiError(f"layer {layer}: its attention mask is not causal, which the op cannot express")
    if scoring.window and seen != min(scoring.window, tokens):
        raise ChaiError(
            f"layer {layer}: it is said to see {scoring.window} tokens and its mask shows it {seen}; report "
            "this model"
        )
    if not scoring.window and seen < tokens:
        scoring = replace(scoring, window=seen)
    return run.function(layer, query, key, value, scoring)


def _active() -> _Run:
    run = _ACTIVE.get()
    if run is None:
        raise RuntimeError("attention implementation 'chai' works only inside chai_export")
    return run


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
