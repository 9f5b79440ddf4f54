"""The torch oracle: a Hugging Face model whose attention is the op over one fresh prefill.

It is the truth that engines are compared with: written against torch, on the model itself, sharing with
the other implementations only the integer choice of the head map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chai_export.errors import ChaiError
from chai_export.models.attention import attention_of, causal_attention, probe_probabilities
from chai_export.models.fused_attention import fresh_prefill, kernels_available
from chai_export.models.geometry import describe
from chai_export.models.kv_sources import describe_model
from chai_export.models.scoring import Scoring
from chai_export.models.sliding import window_of
from chai_export.models.stored_rows import StoredRounding, read_back
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.head_map import assign, cluster_heads, distances, kept_kv_heads, quantise
from chai_export.op.kv_sharing import check_same_kept
from chai_export.op.probe import PAPER_PROBE_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HeadMapRule = Callable[[NDArray[np.float32], int, int], NDArray[np.int32]]
"""(probe probabilities float32 [H, t, t], G, R) -> head map int32 [H]."""

_NEAREST = StoredRounding()
_FEW, _MOST = 12, 1024
"""Tokens of a comparison."""


def op_head_map(probabilities: NDArray[np.float32], num_kv_heads: int, kept: int) -> NDArray[np.int32]:
    """The op's rule (docs/op.md, step 1): k-medoids on quantised probabilities."""
    return cluster_heads(distances(quantise(probabilities)), num_kv_heads, kept)


class Oracle:
    """A model run through the op's semantics in torch.

    Args:
        model: a supported decoder, see :func:`chai_export.models.loading.load_model`.
        kept_heads: R of each layer, 1 … G.
        probe_tokens: P, tokens that are exact and decide the head map.
        online: False applies given maps to every token, the first P included (static membership).
        rule: how a head map is chosen from probe probabilities; the op's rule unless given. A layer that
            reads another layer's cache follows the op: nearest among the heads which that one kept.
        kernels: compute layers whose maps the op decides with the Triton kernels; by default where the model
            is on a GPU and Triton is installed. Given maps, other rules, storage and layers whose scores are
            more than scaled always go through torch.
        storage: what the caches hold; unless given, the rows as they are computed. All tokens but the exact
            first ones read the rows back from there, as in the op.
        equalisers: by layer float32 [G, D], what keys are divided by before they are stored and multiplied
            by again when they are read; a layer that reads another layer's cache has that one's.

    Raises:
        ChaiError: ``kept_heads`` does not fit the model, or differs between layers that read one cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kept_heads: Sequence[int],
        probe_tokens: int = PAPER_PROBE_TOKENS,
        *,
        online: bool = True,
        rule: HeadMapRule = op_head_map,
        kernels: bool | None = None,
        storage: CacheStorage | None = None,
        equalisers: Mapping[int, NDArray[np.float32]] = MappingProxyType({}),
    ) -> None:
        self.model = model
        self.geometry = describe_model(model)
        self.kept_heads = tuple(int(kept) for kept in kept_heads)
        self.probe_tokens = probe_tokens
        self.online = online
        self._storage = storage
        self._equalisers = equalisers
        self._rule = rule
        self._kernels = kernels_available(model.device) if kernels is None else kernels
        self._maps: list[NDArray[np.int32]] = []
        layers, most = self.geometry.num_layers, self.geometry.num_kv_heads
        if len(self.kept_heads) != layers or not all(1 <= kept <= most for kept in self.kept_heads):
            raise ChaiError(
                f"kept heads {list(self.kept_heads)} do not fit a model of {layers} layers "
                f"with {most} KV heads; calibrate this model"
            )
        self._sources = self.geometry.kv_source_layers or tuple(range(layers))
        try:
            check_same_kept(self.kept_heads, self._sources)
        except ValueError as error:
            raise ChaiError(f"{error}; calibrate this model") from None

    @property
    def head_maps(self) -> NDArray[np.int32]:
        """Query head to representative query head in the last call: int32 [L, 1, H]."""
        if not self._maps:
            raise RuntimeError("no call yet, so there are no head maps")
        return np.stack(self._maps)

    def logits(
        self,
        token_ids: Sequence[int] | NDArray[Any],
        head_maps: NDArray[np.integer[Any]] | None = None,
        *,
        stored: StoredRounding = _NEAREST,
    ) -> NDArray[np.float32]:
        """Logits at every position of one sequence fed as one fresh prefill.

        Args:
            token_ids: T token ids.
            head_maps: [L, H] or [L, 1, H], used instead of the maps that the probe would give.
            stored: how rows are rounded to what the caches hold.

        Returns:
            float32 [T, V].
        """
        given = None if head_maps is None else self._checked(head_maps)
        if given is None and not self.online:
            raise ValueError("static membership needs head_maps")
        self._maps = []

        by_rule = given is None and self._rule is op_head_map
        fused = self._kernels and by_rule and self._storage is None

        def layer(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            if fused and scoring.plain and self._sources[index] == index:
                kept = self.kept_heads[index]
                attended, maps = fresh_prefill(query, key, value, kept, scoring.scale, self.probe_tokens)
                self._maps.append(maps.cpu().numpy())
                return attended
            head_map = self._choose(index, query, key, scoring) if given is None else given[index]
            self._maps.append(head_map[None])
            exact = min(self.probe_tokens, query.shape[2]) if self.online else 0
            on_device = torch.from_numpy(head_map).long().to(query.device)
            cached = self._cached(index, key, value, stored)
            return clustered_attention(query, key, value, on_device, scoring, exact, cached)

        with attention_of(self.model, layer):
            return _forward(self.model, token_ids)

    def _cached(
        self, layer: int, key: Tensor, value: Tensor, rounding: StoredRounding
    ) -> tuple[Tensor, Tensor] | None:
        """The rows as they are read back."""
        if self._storage is None:
            return None
        factors = self._equalisers.get(self._sources[layer])
        if factors is None:
            keys = read_back(key, self._storage.key(layer), rounding)
        else:
            divisor = torch.from_numpy(factors[:, None]).to(key.device)
            keys = read_back(key / divisor, self._storage.key(layer), rounding) * divisor
        return keys, read_back(value, self._storage.value(layer), rounding)

    def greedy(
        self,
        token_ids: Sequence[int],
        count: int,
        head_maps: NDArray[np.integer[Any]] | None = None,
    ) -> list[int]:
        """The next ``count`` tokens, the most probable one each time, by repeated prefills."""
        sequence = [int(token) for token in token_ids]
        for _ in range(count):
            sequence.append(int(self.logits(sequence, head_maps)[-1].argmax()))
        return sequence[len(token_ids) :]

    def _choose(self, layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> NDArray[np.int32]:
        kept, groups = self.kept_heads[layer], key.shape[1]
        tokens = min(self.probe_tokens, query.shape[2])
        probabilities = probe_probabilities(query, key, scoring, tokens)[0].cpu().numpy()
        source = self._sources[layer]
        if source == layer:
            return self._rule(probabilities, groups, kept)
        chosen = kept_kv_heads(self._maps[source][0], self.geometry.group)
        return assign(distances(quantise(probabilities)), groups, chosen)

    def _checked(self, head_maps: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        layers, heads = self.geometry.num_layers, self.geometry.num_query_heads
        maps = np.asarray(head_maps)
        if maps.shape == (layers, 1, heads):
            maps = maps[:, 0]
        if maps.shape != (layers, heads) or maps.min() < 0 or maps.max() >= heads:
            raise ValueError(
                f"head maps must be [{layers}, {heads}], entries below {heads}; got {maps.shape}"
            )
        return maps.astype(np.int32)


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: Tensor,
    scoring: Scoring,
    exact: int,
    cached: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Step 4 of the op for one fresh row without padding.

    Args:
        query: [1, H, S, D].
        key: [1, G, S, D].
        value: [1, G, S, Dv].
        head_map: int64 [H], query head to representative query head.
        scoring: what becomes of query·key; sinks and slopes are of each head itself.
        exact: the first tokens, which use their own head's query and key.
        cached: keys and values as all other tokens read them; unless given, ``key`` and ``value``.

    Returns:
        float32 [1, H, S, Dv].
    """
    group = query.shape[1] // key.shape[1]
    cached_keys, cached_values = cached or (key, value)
    representative_keys = cached_keys[:, head_map // group]
    read_values = cached_values.repeat_interleave(group, dim=1)
    shared = causal_attention(query[:, head_map], representative_keys, read_values, scoring)
    if exact == 0:
        return shared
    own_keys = key[:, :, :exact].repeat_interleave(group, dim=1)
    own_values = value[:, :, :exact].repeat_interleave(group, dim=1)
    own = causal_attention(query[:, :, :exact], own_keys, own_values, scoring)
    return torch.cat([own, shared[:, :, exact:]], dim=2)


def model_logits(model: PreTrainedModel, token_ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
    """Logits of the unchanged model, float32 [T, V]: the truth for all heads."""
    return _forward(model, token_ids)


def probe_features(
    model: PreTrainedModel, windows: Sequence[Sequence[int]], probe_tokens: int
) -> list[NDArray[np.float32]]:
    """Probe probabilities of each layer for a batch of token windows.

    Attention is causal, so the first P tokens of a sequence decide its features and nothing more is fed:
    no attention matrix of a whole text ever exists.

    Args:
        model: a supported decoder.
        windows: B windows of exactly ``probe_tokens`` token ids, each the start of a sequence.
        probe_tokens: P.

    Returns:
        Per layer float32 [B, H, P, P].
    """
    features: list[NDArray[np.float32]] = []

    def layer(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        probabilities = probe_probabilities(query, key, scoring, probe_tokens)
        features.append(probabilities.cpu().numpy())
        return probabilities @ value.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)

    with attention_of(model, layer), torch.inference_mode():
        batch = torch.tensor([list(map(int, w)) for w in windows], device=model.device)
        model.base_model(input_ids=batch, use_cache=False)
    return features


def require_same_with_all_heads(model: PreTrainedModel, tolerance: float = 1e-3) -> None:
    """Raise unless the oracle with all heads kept computes what the model computes, on a few fixed tokens.

    For families that no test of ours covers: it notices attention terms that no configuration names.

    Raises:
        ChaiError: the two differ, or a layer does not follow transformers' attention interface.
    """
    geometry = describe(model.config)
    count = max(_FEW, min(_MOST, (window_of(model.config) or 0) + 4))  # past the window, if there is one
    tokens = [(7 * index + 3) % geometry.vocab_size for index in range(count)]
    expected = model_logits(model, tokens)
    got = Oracle(model, geometry.all_kept).logits(tokens)
    worst = float(np.abs(expected - got).max())
    if not worst <= tolerance * max(1.0, float(np.abs(expected).max())):
        raise ChaiError(
            f"attention of this {geometry.model_type} model is not what the op computes (logits with all "
            f"heads kept differ by {worst:.2g}); choose a model of a supported family"
        )


def _forward(model: PreTrainedModel, token_ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
    """float32 [T, V] of one sequence, without a cache."""
    batch = torch.tensor([list(map(int, token_ids))], dtype=torch.long, device=model.device)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(input_ids=batch, use_cache=False).logits[0].float().cpu().numpy()
    return logits
