"""Proof that what happens to the scores before the softmax is a scale, a causal mask and padding: no more.

The arithmetic between Q·K and the softmax is cut out and run on several sizes and masks, with chosen scores:

1. Where attention is allowed (key position ≤ query position, key not padded) the result is exactly
   proportional to the score: no bias, no cap, no window. The factor is the chain's scale.
2. Everywhere else it is so low that its exponential is zero.
3. One query over a very long past obeys the same rules, so a window or a slope shows up.
4. Rows of padded queries are free: nobody reads them.

Unknown arithmetic therefore cannot slip through: it is not recognised by its shape but by what it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.match.site import AttentionSite, CachedHeads, ScoreChain
from chai_export.graph.prove.evaluate import Array, EvaluationError, Slice, cut

LONG_PASTS = (2**20, 2**17, 2**15, 2**13, 2**11, 500)
"""Tried in turn: graphs with mask tables of a fixed length cannot be evaluated beyond it."""

_SIZES = (Sizes(2, 5, 0), Sizes(2, 1, 6), Sizes(3, 4, 3), Sizes(1, 3, 0))
_LARGEST_CACHE = 2**26
"""Bytes of keys and values; repeated heads are made of them."""
_BLOCKED = -9999.0
_SCORES = (1.0, -64.0, 8192.0)


@dataclass(frozen=True)
class _Attention:
    """What is fed for one attention: its caches, and scores of one head that stands for all of them.

    ``heads`` is the real number where the graph insists on it, by a Reshape to [B, H, S, T].
    """

    caches: tuple[CachedHeads, ...] = ()
    heads: int = 1


class MaskError(Exception):
    """The scores are changed by more than a scale, a causal mask and padding."""


@dataclass(frozen=True)
class MaskProof:
    """``scale`` of the chain, and the longest past on which it was seen to be plain causal attention.

    ``chunks`` is False if the source cannot run several tokens after a past, so that nothing was seen there.
    """

    scale: float
    longest_past: int
    chunks: bool = True


class MaskProver:
    """Proves score chains of one graph; equal chains (all layers share a mask) are evaluated once."""

    def __init__(self, graph: ir.Graph, roles: Roles) -> None:
        self._graph = graph
        self._roles = roles
        self._known: dict[tuple[object, ...], MaskProof] = {}

    def prove(self, chain: ScoreChain, site: AttentionSite | None = None) -> MaskProof:
        """Evaluate a chain, of ``site`` or (to find a better reason) of an attention that was refused.

        Raises:
            MaskError: with the reason in words.
        """
        if chain.scores is None and chain.mask is None:
            if not chain.causal:
                raise MaskError("there is no mask, so tokens would see the future")
            return MaskProof(1.0, LONG_PASTS[0])
        key = _signature(chain)
        if key not in self._known:
            self._known[key] = self._prove(chain, site)
        return self._known[key]

    def _prove(self, chain: ScoreChain, site: AttentionSite | None) -> MaskProof:
        fed = _Attention() if site is None else _Attention((site.key, site.value))
        # Masks may be cut to the size of the (repeated) keys, so these are leaves of known size.
        leaves = [cache.new for cache in fed.caches] + ([] if chain.scores is None else [chain.scores])
        target = chain.mask if chain.scores is None else chain.logits
        assert target is not None
        try:
            part = cut(self._graph, leaves, [target], self._roles)
        except EvaluationError as error:
            raise MaskError(f"the mask cannot be evaluated: {error}") from error
        if site is not None and chain.scores is not None and not self._runs(part, chain, fed):
            fed = replace(fed, heads=site.heads.num_query_heads)
        scales = []
        chunks = True
        for sizes in map(self._roles.fit, _SIZES):
            for padding in _paddings(sizes):
                try:
                    scales.append(self._check(part, chain, fed, sizes, padding))
                except EvaluationError as error:
                    if sizes.tokens == 1 or sizes.past == 0:
                        raise MaskError(f"the mask cannot be evaluated: {error}") from error
                    chunks = False
        if not np.allclose(scales, scales[0], rtol=1e-5):
            raise MaskError("the scale of the scores depends on the sizes")
        return MaskProof(scales[0], self._check_long(part, chain, fed), chunks)

    def _runs(self, part: Slice, chain: ScoreChain, fed: _Attention) -> bool:
        sizes = self._roles.fit(_SIZES[0])
        try:
            self._check(part, chain, fed, sizes, _paddings(sizes)[0])
        except EvaluationError:
            return False
        return True

    def _check_long(self, part: Slice, chain: ScoreChain, attention: _Attention) -> int:
        failure: EvaluationError | None = None
        for past in self._long_pasts(part, attention):
            sizes = Sizes(1, 1, past)
            try:
                self._check(part, chain, attention, sizes, np.ones((1, sizes.total), np.int64))
            except EvaluationError as error:
                failure = error
                continue
            return past
        raise MaskError(f"the mask cannot be evaluated on a long past: {failure}")

    def _long_pasts(self, part: Slice, attention: _Attention) -> list[int]:
        """Longest first; limited by fixed caches, and by memory where keys or all heads have to be fed."""
        capacity = self._roles.capacity
        if capacity is not None:
            return [capacity - 1]
        fed = [self._roles.cache_sizes[cache.past] for cache in attention.caches if cache.past in part.inputs]
        row = 4 * (sum(heads * dim for heads, dim in fed) + (attention.heads if attention.heads > 1 else 0))
        return [past for past in LONG_PASTS if past * row <= _LARGEST_CACHE] or [LONG_PASTS[-1]]

    def _check(
        self, part: Slice, chain: ScoreChain, attention: _Attention, sizes: Sizes, padding: Array
    ) -> float:
        """Compare one evaluation with the expected mask; return the chain's scale."""
        roles = self._roles
        feeds = roles.feeds(sizes, padding)
        for cache in attention.caches:
            if cache.past in part.inputs:
                feeds[cache.past] = roles.cache_array(cache.past, sizes)
            heads, dim = roles.cache_sizes[cache.past]
            feeds[cache.new] = np.zeros((sizes.batch, heads, sizes.tokens, dim), np.float32)
        columns = roles.columns(sizes)
        allowed = _allowed(sizes, padding, roles.attention_mask is not None, columns)
        judged = np.broadcast_to((padding[:, None, sizes.past :, None] != 0), allowed.shape)
        if chain.scores is None:
            (mask,) = part.run(roles, sizes, feeds)
            _compare(_additive(mask, chain, sizes, columns), allowed, judged, sizes)
            return 1.0
        shape = self._score_shape(chain.scores, sizes, columns, attention.heads)

        def evaluate(score: float) -> Array:
            assert chain.scores is not None
            scores = np.full(shape, score, np.float32)
            (logits,) = part.run(roles, sizes, {**feeds, chain.scores: scores})
            return np.asarray(logits, np.float32).reshape(sizes.batch, -1, sizes.tokens, columns)

        base = evaluate(0.0)
        _compare(base, allowed, judged, sizes)
        return _linear_scale(evaluate, allowed & judged, base.shape)

    def _score_shape(self, scores: ir.Value, sizes: Sizes, columns: int, heads: int) -> tuple[int, ...]:
        """[B, heads, S, T], unless batch and heads are merged into one axis."""
        dims = self._roles.dims(scores, sizes)
        if dims is None or len(dims) != 3 or dims[0] is None:
            return (sizes.batch, heads, sizes.tokens, columns)
        return (dims[0], sizes.tokens, columns)


def _linear_scale(evaluate: Callable[[float], Array], judged: Array, shape: tuple[int, ...]) -> float:
    """The one factor between scores and logits where attention is allowed."""
    where = np.broadcast_to(judged, shape)
    scale = 0.0
    for score in _SCORES:
        ratio = evaluate(score)[where] / np.float32(score)
        scale = float(ratio.flat[0]) if score == _SCORES[0] else scale
        if not np.allclose(ratio, scale, rtol=1e-4, atol=0):
            raise MaskError("the scores are not just scaled before the softmax (a cap, or a factor per head)")
    if scale <= 0:
        raise MaskError("the scores are multiplied by a factor that is not positive")
    return scale


def _compare(logits: Array, allowed: Array, judged: Array, sizes: Sizes) -> None:
    """Zero where attention is allowed and hopeless elsewhere, in judged rows; [B, 1 or H, S, T]."""
    try:
        shape = np.broadcast_shapes(logits.shape, allowed.shape)
    except ValueError:
        raise MaskError(
            f"the mask has shape {list(logits.shape)} for {sizes.tokens} tokens after {sizes.past}"
        ) from None
    logits = np.broadcast_to(logits, shape)
    allowed, judged = np.broadcast_to(allowed, shape), np.broadcast_to(judged, shape)
    missing = judged & allowed & ~(logits > _BLOCKED)
    if missing.any():
        row = np.argwhere(missing)[0]
        distance = sizes.past + int(row[2]) - int(row[3])
        last = np.nonzero(missing[row[0], row[1], row[2]])[0].max()
        window = sizes.past + int(row[2]) - int(last)
        if sizes.tokens == 1 and window > 0 and sizes.past > 6:
            raise MaskError(f"a sliding window of {window} tokens hides earlier ones")
        raise MaskError(f"a key {distance} tokens back is hidden although it is neither future nor padding")
    extra = judged & ~allowed & ~(logits <= _BLOCKED)
    if extra.any():
        row = np.argwhere(extra)[0]
        ahead = int(row[3]) - sizes.past - int(row[2])
        what = f"{ahead} tokens ahead" if ahead > 0 else "that is padding"
        raise MaskError(f"a query sees a key {what}, so the mask is not causal with padding")
    biased = judged & allowed & (np.abs(logits) > 1e-6)
    if biased.any():
        raise MaskError("a bias is added to the scores (ALiBi or relative positions)")


def _allowed(sizes: Sizes, padding: Array, has_mask: bool, columns: int) -> Array:
    query = np.arange(sizes.past, sizes.total)[:, None]
    causal = np.arange(columns)[None, :] <= query
    keys = np.ones((sizes.batch, 1, 1, columns), bool)
    if has_mask:
        keys[:, 0, 0, : sizes.total] = padding != 0
    return np.asarray(causal[None, None] & keys)


def _paddings(sizes: Sizes) -> list[Array]:
    """All tokens; the last row padded on the right; the first row padded on the left."""
    every = np.ones((sizes.batch, sizes.total), np.int64)
    paddings = [every]
    if sizes.tokens > 1:
        right = every.copy()
        right[-1, -2:] = 0
        paddings.append(right)
    if sizes.total > 3:
        left = every.copy()
        left[0, :2] = 0
        paddings.append(left)
    return paddings


def _additive(mask: Array, chain: ScoreChain, sizes: Sizes, columns: int) -> Array:
    """An Attention node's mask as what is added to the scores."""
    added = np.where(mask, 0.0, -np.inf) if mask.dtype == np.bool_ else np.asarray(mask, np.float64)
    if added.ndim < 4:
        added = added.reshape((1,) * (4 - added.ndim) + added.shape)
    if chain.causal:
        query = np.arange(sizes.past, sizes.total)[:, None]
        added = np.where(np.arange(columns)[None, :] <= query, added, -np.inf)
    return np.asarray(added, np.float32)


def _signature(chain: ScoreChain) -> tuple[object, ...]:
    """The chain as nested tuples with the scores left out: equal for layers that share their mask."""
    if chain.scores is None:
        return ("mask", chain.mask, chain.causal)

    def describe(value: ir.Value) -> object:
        node = value.producer()
        if value is chain.scores:
            return "scores"
        if node is None or not _leads_to(value, chain.scores):
            return value
        attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
        return (node.op_type, attributes, tuple(describe(v) for v in node.inputs if v is not None))

    assert chain.logits is not None
    return ("chain", describe(chain.logits))


def _leads_to(value: ir.Value, target: ir.Value | None, depth: int = 8) -> bool:
    if value is target:
        return True
    node = value.producer()
    if node is None or depth == 0:
        return False
    return any(item is not None and _leads_to(item, target, depth - 1) for item in node.inputs)
