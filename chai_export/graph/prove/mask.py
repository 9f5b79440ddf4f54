"""Proof that scores get a scale, a cap, slopes, a causal mask, a window and padding: no more.

The arithmetic between Q·K and the softmax is cut out and run on several sizes and masks, with chosen scores:

1. One query over a very long past shows how far it sees: the window, or none.
2. Where attention is allowed (key position ≤ query position, within the window, key not padded) the result is
   exactly proportional to the score, or c·tanh of it over c, and no bias or that of ALiBi is added: one that
   grows evenly from key to key, by a slope for each head. The factor is the chain's scale.
3. Everywhere else it is so low that its exponential is zero.
4. Both hold for small sizes, and where a window begins to hide: at pasts around it, in chunks, with padding.
5. Rows of padded queries are free: nobody reads them.

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
_SMALL, _HUGE = 2.0**-10, 2.0**100
"""Scores that a cap leaves as they are, and that it holds at c."""
_CAP_DIGITS = 6
_FLAT, _ROUNDING = 1e-6, 5e-7
"""A bias that is none, and what float32 makes of one, as a part of it."""
_BIAS = "a bias is added to the scores (relative positions, or another than ALiBi)"
_DIGITS = {ir.DataType.FLOAT: 24, ir.DataType.FLOAT16: 11, ir.DataType.BFLOAT16: 8}
"""Binary digits of a type's numbers."""
_LONGEST_FRESH = 1024
"""Windows of up to so many tokens are also looked at in a fresh row that is longer."""


@dataclass(frozen=True)
class _Attention:
    """What is fed for one attention: its caches, and scores of one head that stands for all of them.

    ``heads`` is the real number where the graph insists on it, by a Reshape to [B, H, S, T].
    """

    caches: tuple[CachedHeads, ...] = ()
    heads: int = 1


class MaskError(Exception):
    """The scores are changed by more than the op can say."""


@dataclass(frozen=True)
class MaskProof:
    """``scale`` of the chain, and the longest past on which it was seen to be causal attention.

    ``chunks`` is False if the source cannot run several tokens after a past, so that nothing was seen there.
    ``window`` and ``softcap`` are the op's attributes, 0 for none, ``sinks`` and ``slopes`` its inputs, None
    for none.
    """

    scale: float
    longest_past: int
    chunks: bool = True
    window: int = 0
    softcap: float = 0.0
    sinks: tuple[float, ...] | None = None
    slopes: tuple[float, ...] | None = None


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
            proof = MaskProof(1.0, LONG_PASTS[0])
        else:
            key = _signature(chain)
            if key not in self._known:
                self._known[key] = self._prove(chain, site)
            proof = self._known[key]
        return proof if chain.sinks is None else replace(proof, sinks=self._sinks(chain.sinks))

    def _sinks(self, value: ir.Value) -> tuple[float, ...]:
        """The sink of each head, which must be a constant."""
        found = []
        try:
            part = cut(self._graph, [], [value], self._roles)
            for sizes in map(self._roles.fit, _SIZES):
                every = np.ones((sizes.batch, sizes.total), np.int64)
                (sinks,) = part.run(self._roles, sizes, self._roles.feeds(sizes, every))
                rows = (1, -1, 1) if sinks.ndim == 1 else (sizes.batch, -1, sizes.tokens)
                by_row = sinks.reshape(rows)
                found.append(by_row.transpose(0, 2, 1).reshape(-1, by_row.shape[1]))
        except (EvaluationError, ValueError) as error:
            raise MaskError(f"the attention sinks cannot be evaluated: {error}") from error
        first = found[0][0]
        if not all(tokens.shape[1] == first.size and (tokens == first).all() for tokens in found):
            raise MaskError("the attention sinks are not one constant for each head")
        return tuple(map(float, first))

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
        slopes = self._find_slopes(part, chain, fed)
        past, window = self._find_window(part, chain, fed, slopes)
        factors = []
        chunks = True
        for sizes in map(self._roles.fit, (*_SIZES, *self._edges(window), Sizes(1, 1, past))):
            for padding in _paddings(sizes):
                try:
                    factors.append(self._check(part, chain, fed, sizes, padding, window, slopes))
                except EvaluationError as error:
                    if sizes.tokens == 1 or sizes.past == 0:
                        raise MaskError(f"the mask cannot be evaluated: {error}") from error
                    chunks = False
        if not np.allclose(factors, factors[0], rtol=1e-5):
            raise MaskError("the scale of the scores depends on the sizes")
        scale, softcap = factors[0]
        if slopes is not None:
            self._require_even_steps(part, site)
        of_heads = None if slopes is None else tuple(map(float, np.broadcast_to(slopes, self._heads(site))))
        return MaskProof(scale, past, chunks, window, softcap, slopes=of_heads)

    def _runs(self, part: Slice, chain: ScoreChain, fed: _Attention) -> bool:
        sizes = self._roles.fit(_SIZES[0])
        try:
            self._evaluated(part, chain, fed, sizes, _paddings(sizes)[0])
        except EvaluationError:
            return False
        return True

    @staticmethod
    def _heads(site: AttentionSite | None) -> int:
        if site is None:
            raise MaskError("ALiBi is added to the scores")
        return site.heads.num_query_heads

    def _find_slopes(self, part: Slice, chain: ScoreChain, attention: _Attention) -> Array | None:
        """Of ALiBi, for each head or [1] for all alike; None where the last two keys get the same."""
        sizes = self._roles.fit(_SIZES[0])
        try:
            base, _ = self._evaluated(part, chain, attention, sizes, _paddings(sizes)[0])
        except EvaluationError as error:
            raise MaskError(f"the mask cannot be evaluated: {error}") from error
        last = base[0, :, -1, sizes.total - 2 : sizes.total]
        slopes = last[:, 1] - last[:, 0]
        if not (last > _BLOCKED).all() or not (np.abs(slopes) > _FLAT).any():
            return None
        # What is not even among a few keys would look like a window among many.
        level = _level(base, sizes, slopes)
        if (np.abs(level[base > _BLOCKED]) > _rounding(sizes, slopes)).any():
            raise MaskError(_BIAS)
        return slopes

    @staticmethod
    def _require_even_steps(part: Slice, site: AttentionSite | None) -> None:
        """Slopes are found in float32, where steps look even that types of fewer digits make uneven."""
        digits = 0 if site is None or site.key.past.dtype is None else _DIGITS.get(site.key.past.dtype, 0)
        for each in part.casts:
            if _DIGITS.get(each, digits) < digits:
                raise MaskError(
                    f"ALiBi is computed in {each.name.lower()}, which makes its steps uneven from key to "
                    "key beside caches of more digits"
                )

    def _find_window(
        self, part: Slice, chain: ScoreChain, attention: _Attention, slopes: Array | None
    ) -> tuple[int, int]:
        """The longest past that can be evaluated, and how many positions a query sees there; 0: all."""
        failure: EvaluationError | None = None
        for past in self._long_pasts(part, attention, 1 if slopes is None else slopes.size):
            sizes = self._roles.fit(Sizes(1, 1, past))
            every = np.ones((sizes.batch, sizes.total), np.int64)
            try:
                logits, _ = self._evaluated(part, chain, attention, sizes, every)
            except EvaluationError as error:
                failure = error
                continue
            level = _level(logits, sizes, slopes)
            visible = np.nonzero(level[0, 0, 0, : sizes.total] > _BLOCKED)[0]
            first = int(visible[0]) if visible.size else 0
            return past, sizes.total - first if first else 0
        raise MaskError(f"the mask cannot be evaluated on a long past: {failure}")

    def _edges(self, window: int) -> list[Sizes]:
        """Sizes at which a window begins to hide something, as far as a fixed cache has room for them."""
        if not window:
            return []
        sizes = [Sizes(1, 1, past) for past in (window - 2, window - 1, window, 2 * window) if past > 0]
        sizes += [Sizes(2, 4, max(1, window - 2)), Sizes(1, 3, 3 * window)]
        sizes += [Sizes(1, window + 2, 0)] if window <= _LONGEST_FRESH else []
        room = self._roles.capacity
        return [each for each in sizes if room is None or each.total <= room]

    def _long_pasts(self, part: Slice, attention: _Attention, biases: int) -> list[int]:
        """Longest first; limited by fixed caches, and by memory where keys or all heads have to be fed."""
        capacity = self._roles.capacity
        if capacity is not None:
            return [capacity - 1]
        fed = [self._roles.cache_sizes[cache.past] for cache in attention.caches if cache.past in part.inputs]
        of_heads = max(attention.heads, biases)
        row = 4 * (sum(heads * dim for heads, dim in fed) + (of_heads if of_heads > 1 else 0))
        return [past for past in LONG_PASTS if past * row <= _LARGEST_CACHE] or [LONG_PASTS[-1]]

    def _check(
        self,
        part: Slice,
        chain: ScoreChain,
        attention: _Attention,
        sizes: Sizes,
        padding: Array,
        window: int,
        slopes: Array | None,
    ) -> tuple[float, float]:
        """Compare one evaluation with the expected mask; return the chain's scale and soft cap."""
        base, evaluate = self._evaluated(part, chain, attention, sizes, padding)
        has_mask = self._roles.attention_mask is not None
        allowed = _allowed(sizes, padding, has_mask, self._roles.columns(sizes), window)
        judged = np.broadcast_to((padding[:, None, sizes.past :, None] != 0), allowed.shape)
        _compare(_level(base, sizes, slopes), allowed, judged, sizes, window, _rounding(sizes, slopes))
        return (1.0, 0.0) if evaluate is None else _scale_and_cap(evaluate, allowed & judged, base)

    def _evaluated(
        self, part: Slice, chain: ScoreChain, attention: _Attention, sizes: Sizes, padding: Array
    ) -> tuple[Array, Callable[[float], Array] | None]:
        """What is added to scores of 0, [B, 1 or H, S, T], and the logits of any score all over.

        Raises:
            EvaluationError: ONNX Runtime cannot run these sizes.
        """
        roles = self._roles
        feeds = roles.feeds(sizes, padding)
        for cache in attention.caches:
            if cache.past in part.inputs:
                feeds[cache.past] = roles.cache_array(cache.past, sizes)
            heads, dim = roles.cache_sizes[cache.past]
            feeds[cache.new] = np.zeros((sizes.batch, heads, sizes.tokens, dim), np.float32)
        columns = roles.columns(sizes)
        if chain.scores is None:
            (mask,) = part.run(roles, sizes, feeds)
            return _additive(mask, chain, sizes, columns), None
        shape = self._score_shape(chain.scores, sizes, columns, attention.heads)

        def evaluate(score: float) -> Array:
            assert chain.scores is not None
            scores = np.full(shape, score, np.float32)
            (logits,) = part.run(roles, sizes, {**feeds, chain.scores: scores})
            return np.asarray(logits, np.float32).reshape(sizes.batch, -1, sizes.tokens, columns)

        return evaluate(0.0), evaluate

    def _score_shape(self, scores: ir.Value, sizes: Sizes, columns: int, heads: int) -> tuple[int, ...]:
        """[B, heads, S, T], unless batch and heads are merged into one axis."""
        dims = self._roles.dims(scores, sizes)
        if dims is None or len(dims) != 3 or dims[0] is None:
            return (sizes.batch, heads, sizes.tokens, columns)
        return (dims[0], sizes.tokens, columns)


def _scale_and_cap(evaluate: Callable[[float], Array], judged: Array, base: Array) -> tuple[float, float]:
    """The one factor between scores and logits where attention is allowed, and c of c·tanh(score/c) or 0."""
    where = np.broadcast_to(judged, base.shape)
    added = base[where].astype(np.float64)
    logits = {score: evaluate(score)[where] - added for score in (*_SCORES, _SMALL, _HUGE)}
    largest, small = float(logits[_HUGE].flat[0]), float(logits[_SMALL].flat[0]) / _SMALL
    capped = largest < 2 * small * _SCORES[-1]
    scale = small if capped else largest / _HUGE  # which no bias can blur
    if scale <= 0:
        raise MaskError("the scores are multiplied by a factor that is not positive")
    expected, cap = {score: scale * score for score in logits}, 0.0
    if capped:
        cap = float(f"{largest:.{_CAP_DIGITS}g}")
        expected = {score: cap * float(np.tanh(each / cap)) for score, each in expected.items()}
    blur = _ROUNDING * float(np.abs(added).max(initial=0.0))
    for score, found in logits.items():
        if not np.allclose(found, expected[score], rtol=1e-4, atol=blur):
            raise MaskError(
                "the scores are not just scaled or soft-capped before the softmax (clipped, or by a factor "
                "per head)"
            )
    return scale, cap


def _level(logits: Array, sizes: Sizes, slopes: Array | None) -> Array:
    """Logits without ALiBi: as high at every key that a query sees as at its own place, which is 0."""
    if slopes is None:
        return logits
    query, key = np.arange(sizes.past, sizes.total), np.arange(logits.shape[3])
    level = logits - slopes[:, None, None].astype(np.float64) * (key - query[:, None])
    with np.errstate(invalid="ignore"):  # a padded query may see nothing: -inf - -inf
        return np.asarray(level - np.take_along_axis(level, query[None, None, :, None], axis=3))


def _rounding(sizes: Sizes, slopes: Array | None) -> float:
    """What float32 makes of a bias that should be 0."""
    return _FLAT if slopes is None else _FLAT + _ROUNDING * float(np.abs(slopes).max()) * sizes.total


def _compare(
    logits: Array, allowed: Array, judged: Array, sizes: Sizes, window: int, rounding: float
) -> None:
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
        within = f", within a window of {window} tokens" if window else ""
        raise MaskError(
            f"a key {distance} tokens back is hidden although it is neither future nor padding{within}"
        )
    extra = judged & ~allowed & ~(logits <= _BLOCKED)
    if extra.any():
        row = np.argwhere(extra)[0]
        ahead = int(row[3]) - sizes.past - int(row[2])
        what = f"{ahead} tokens ahead" if ahead > 0 else "that is padding"
        if window and -ahead >= window:
            what = f"{-ahead} tokens back, past a window of {window}"
        raise MaskError(f"a query sees a key {what}, so the mask is not causal with padding")
    biased = judged & allowed & (np.abs(logits) > rounding)
    if biased.any():
        raise MaskError(_BIAS)


def _allowed(sizes: Sizes, padding: Array, has_mask: bool, columns: int, window: int) -> Array:
    query, key = np.arange(sizes.past, sizes.total)[:, None], np.arange(columns)[None, :]
    causal = key <= query
    if window:
        causal &= key > query - window
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
