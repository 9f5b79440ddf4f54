"""What each way to store a layer's cache does to a model's predictions, for all layers at once.

To second order, the divergence of predictions that a change δ of a layer's attended values causes is
½·|Aδ|², where A leads from there to the logits and on through a root of their Fisher information. A is never
written down: one backward pass of the exact model with random signs for the Fisher root's columns gives
g = Aᵀz at every layer, and the expectation of ½·(g·δ)² over z is that divergence. So a window costs one
forward pass and a few backward ones, however many options there are, and of an option only its own layer's
attention is computed. What one such sample says of an option is a single random number; means over windows
and samples are what is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chai_export.models.attention import attention_of, causal_attention, probe_probabilities
from chai_export.models.scoring import Scoring
from chai_export.models.stored_rows import StoredRounding, read_back
from chai_export.op.head_map import assign, cluster_heads, distances, kept_kv_heads, quantise
from chai_export.op.kv_sharing import owners
from chai_export.op.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEAREST = StoredRounding()


@dataclass(frozen=True)
class Options:
    """What a layer can be given: every kept number with every key bits with every value bits."""

    kept_heads: tuple[int, ...]
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    group: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of each."""
        return len(self.kept_heads), len(self.key_bits), len(self.value_bits)


@dataclass
class _Layer:
    """What one layer's attention had in the exact pass."""

    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring
    change: Tensor
    """Added to the attended values: zero, and what the backward passes arrive at."""


def option_damage(
    model: PreTrainedModel,
    window: NDArray[np.int32],
    options: Options,
    *,
    probe_tokens: int,
    equalisers: Mapping[int, NDArray[np.float32]],
    sources: Sequence[int] | None,
    passes: int,
    seed: int,
) -> NDArray[np.float64]:
    """KL divergence that each option of each cache causes by itself in one window, by ``passes`` samples.

    Args:
        model: a supported decoder in float32.
        window: int32 [T], a sequence.
        options: what caches can be given.
        probe_tokens: P; the first P tokens attend exactly, whatever the option.
        equalisers: by layer float32 [G, D], what keys in 4 bits are divided by.
        sources: for each layer the one whose cache it reads; None if each has its own.
        passes: backward passes; each has signs of its own.
        seed: of the signs.

    Returns:
        float64 [caches, kept numbers, key bits, value bits]: estimated nats, summed over the tokens of the
        window. Readers of one cache count together.
    """
    layers: list[_Layer] = []

    def exact(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        keys, values = _repeated(key, query), _repeated(value, query)
        if scoring.plain:
            attended = torch.nn.functional.scaled_dot_product_attention(
                query.float(), keys, values, is_causal=True, scale=scoring.scale
            )
        else:
            attended = causal_attention(query, keys, values, scoring)
        change = torch.zeros_like(attended, requires_grad=True)
        layers.append(_Layer(query.detach(), key.detach(), value.detach(), scoring, change))
        return attended + change

    batch = torch.from_numpy(window[None]).long().to(model.device)
    with _frozen(model), torch.enable_grad(), attention_of(model, exact):
        logits = model(input_ids=batch, use_cache=False).logits[0].float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gradients = [_gradients(logits, layers, generator, last=n == passes - 1) for n in range(passes)]
    caches = owners(sources, len(layers))
    moved = np.zeros((passes, len(caches), *options.shape))
    maps: dict[tuple[int, int], NDArray[np.int32]] = {}
    with torch.no_grad():
        for index, layer in enumerate(layers):
            source = index if sources is None else sources[index]
            towards = torch.stack([of_pass[index] for of_pass in gradients])[:, :, probe_tokens:]
            factors = equalisers.get(source)
            for place, attended in _every_option(index, source, layer, options, probe_tokens, factors, maps):
                along = torch.einsum("phtd,htvd->pv", towards, attended)
                moved[(slice(None), caches.index(source), *place)] += along.double().cpu().numpy()
    result: NDArray[np.float64] = (moved**2).mean(axis=0) / 2
    return result


def _gradients(
    logits: Tensor, layers: Sequence[_Layer], generator: torch.Generator, *, last: bool
) -> list[Tensor]:
    """g of every layer, [H, T, Dv], for fresh random signs.

    The Fisher information of logits with probabilities p is diag(p) − ppᵀ; with signs z, (√p·z) − p·(√pᵀz)
    has it as its covariance.
    """
    with torch.no_grad():
        probabilities = torch.softmax(logits, dim=-1)
        signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8).to(logits.device)
        root = probabilities.sqrt().mul_(signs.mul_(2).sub_(1))
        weights = root - probabilities * root.sum(dim=-1, keepdim=True)
    found = torch.autograd.grad(
        logits, [layer.change for layer in layers], grad_outputs=weights, retain_graph=not last
    )
    return [gradient[0] for gradient in found]


def _every_option(
    index: int,
    source: int,
    layer: _Layer,
    options: Options,
    probe_tokens: int,
    factors: NDArray[np.float32] | None,
    maps: dict[tuple[int, int], NDArray[np.int32]],
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """((kept index, key bits index), change of attended values [H, T − P, value bits, Dv]) of a layer.

    Only the tokens from P on are there: the others do not change. ``maps`` remembers the maps of every layer
    by kept number, for those that read its cache.
    """
    heads, groups = layer.query.shape[1], layer.key.shape[1]
    group = heads // groups
    per_head = torch.arange(heads, device=layer.query.device) // group
    stored = [
        read_back(layer.value[0], Storage(bits, layer.value.shape[3], options.group), _NEAREST)
        for bits in options.value_bits
    ]
    values = torch.cat(stored, dim=-1)[per_head]
    plain = torch.arange(heads, device=layer.query.device)
    exact = (
        _probabilities(layer, layer.key[0].float(), plain, probe_tokens)
        @ _repeated(layer.value, layer.query)[0]
    )
    keys = [_keys(layer, bits, options.group, factors) for bits in options.key_bits]
    for k, kept in enumerate(options.kept_heads):
        head_map = plain
        if kept < groups:
            chosen = _head_map(index, source, layer, kept, probe_tokens, maps)
            head_map = torch.from_numpy(chosen).long().to(layer.query.device)
        for b, of_bits in enumerate(keys):
            attended = _probabilities(layer, of_bits, head_map, probe_tokens) @ values
            by_bits = attended.reshape(*attended.shape[:2], len(stored), -1)
            yield (k, b), by_bits - exact[:, :, None]


def _probabilities(layer: _Layer, keys: Tensor, head_map: Tensor, first: int) -> Tensor:
    """Probabilities of the tokens from ``first`` on under a head map: float32 [H, T − first, T]."""
    group = layer.query.shape[1] // keys.shape[0]
    queries = layer.query[0, head_map, first:].float()
    return layer.scoring.probabilities(queries @ keys[head_map // group].transpose(1, 2), first)


def _keys(layer: _Layer, bits: int, group: int, factors: NDArray[np.float32] | None) -> Tensor:
    """The keys as they are read back, float32 [G, T, D]."""
    rows = layer.key[0].float()
    storage = Storage(bits, rows.shape[-1], group)
    if bits != 4 or factors is None:
        return read_back(rows, storage, _NEAREST)
    divisor = torch.from_numpy(factors[:, None]).to(rows.device)
    return read_back(rows / divisor, storage, _NEAREST) * divisor


def _head_map(
    index: int,
    source: int,
    layer: _Layer,
    kept: int,
    probe_tokens: int,
    maps: dict[tuple[int, int], NDArray[np.int32]],
) -> NDArray[np.int32]:
    """The op's choice for this sequence, int32 [H]."""
    tokens = min(probe_tokens, layer.query.shape[2])
    groups = layer.key.shape[1]
    probabilities = probe_probabilities(layer.query, layer.key, layer.scoring, tokens)[0].cpu().numpy()
    found = distances(quantise(probabilities))
    if source == index:
        chosen = cluster_heads(found, groups, kept)
    else:
        of_source = kept_kv_heads(maps[source, kept], layer.query.shape[1] // groups)
        chosen = assign(found, groups, of_source)
    maps[index, kept] = chosen
    return chosen


def _repeated(rows: Tensor, query: Tensor) -> Tensor:
    """KV rows once for each query head, float32."""
    return rows.float().repeat_interleave(query.shape[1] // rows.shape[1], dim=1)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradients of weights: they are not needed, and cost as much as those of activations."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
