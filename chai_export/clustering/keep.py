"""How many KV heads each layer keeps: the rules of ``--keep``.

``elbow``       per layer the first k where little error is left and one more head removes little of it
``budget:X``    the share X of the KV-cache bytes saved, heads spent where the error curves say they matter
``all``         every head, plain multi-head attention
``32,32,8,…``   one number per layer
``@FILE``       the numbers of another clusters.json

Layers that read one cache (docs/op.md) get one R. Rules decide it from the sum of their error curves and
count the cache's bytes once; numbers given by hand must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from chai_export.arguments import shown
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError, UsageError
from chai_export.op.heads import DecoderHeads
from chai_export.op.kv_sharing import for_each_layer, readers

ELBOW_REMAINING = 0.01
"""At an elbow at most this share of the error with one kept head is left."""

ELBOW_STEP = 0.25
"""At an elbow one more head still leaves at least this share of what is left."""

Curves = Sequence[Sequence[float]]


class KeepRule(Protocol):
    """Chooses R for each layer."""

    def check(self, model: DecoderHeads) -> None:
        """Raise ChaiError if the rule cannot be met by such a model, before anything is measured."""

    def choose(self, curves: Curves, model: DecoderHeads) -> tuple[int, ...]:
        """R of each layer; ``curves`` is [L][G], the cost of layer l with k heads kept at [l][k-1]."""


def parse_keep(rule: str) -> KeepRule:
    """The rule that a ``--keep`` text names.

    Raises:
        UsageError: no such rule.
        ChaiError: the file of ``@FILE`` cannot be used.
    """
    if not isinstance(rule, str):
        raise UsageError(f"keep is {shown(rule)}; give a rule such as elbow or budget:0.2")
    if rule == "elbow":
        return Elbow()
    if rule == "all":
        return Budget(0.0)
    if rule.startswith("budget:"):
        try:
            share = float(rule.removeprefix("budget:"))
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:  # not even 0 ≤ NaN
            raise UsageError(
                f"--keep {rule}: give the share of KV-cache bytes to save, from 0 to less than 1, such as "
                "budget:0.214"
            )
        return Budget(share)
    if rule.startswith("@"):
        return Numbers(Clusters.load(rule[1:]))
    try:
        numbers = tuple(int(number) for number in rule.split(","))
    except ValueError:
        raise UsageError(
            f"--keep {rule}: choose elbow, budget:SHARE, all, numbers per layer (32,32,8,…) or @clusters.json"
        ) from None
    return Numbers(Clusters(kept_heads=numbers, origin=f"--keep {rule}"))


@dataclass(frozen=True)
class Elbow:
    """Per layer the smallest k at which the error curve has flattened.

    The curve e_1 ≥ … ≥ e_G = 0 is flat at k if little is left, e_k ≤ 0.01·e_1, and the next head would not
    remove most of that, e_{k+1} ≥ 0.25·e_k. The first condition finds the end of a steep curve, the second
    keeps going down a cliff that reaches below it. A layer with k distinct heads has e_k = 0 < e_{k-1}, so
    exactly k is found; a layer without redundancy falls to the last head and keeps all.
    """

    def check(self, model: DecoderHeads) -> None:
        """Every model has an elbow."""

    def choose(self, curves: Curves, model: DecoderHeads) -> tuple[int, ...]:
        """See :class:`KeepRule`."""
        return _same_for_readers([elbow(curve) for curve in _by_cache(curves, model)], model)


def elbow(curve: Sequence[float]) -> int:
    """The elbow of one error curve (see :class:`Elbow`): how many heads to keep, 1 … G."""
    for kept in range(1, len(curve)):
        left, after_next = curve[kept - 1], curve[kept]
        if left <= ELBOW_REMAINING * curve[0] and after_next >= ELBOW_STEP * left:
            return kept
    return len(curve)


@dataclass(frozen=True)
class Budget:
    """A share of the KV-cache bytes saved, met from above to within one head of one layer.

    Heads past a layer's elbow repeat others and go first; only when none is left do layers fall below their
    elbows. Within that, of all ways to drop so many heads the one with the smallest sum of costs is taken:
    exact by dynamic programming, since error curves need not be convex. (The sum alone would also take heads
    of layers without redundancy, where two look alike during the probe and differ later: on the demo model
    at 21.4 % that costs 0.041 nats instead of 0.011.)
    """

    share: float

    def check(self, model: DecoderHeads) -> None:
        """Raise ChaiError when the share is out of reach; the message names the largest one."""
        largest = model.kv_bytes_saved([1] * model.num_layers)
        if not 0.0 <= self.share <= largest + 1e-9:
            raise ChaiError(
                f"a budget of {self.share:g} is out of reach: one KV head kept in every layer saves "
                f"{_rounded_down(largest)} of this model's KV-cache bytes; "
                "choose --keep budget:X, X from 0 to that"
            )

    def choose(self, curves: Curves, model: DecoderHeads) -> tuple[int, ...]:
        """See :class:`KeepRule`."""
        drop = self.heads_to_drop(model)
        costs = _by_cache(curves, model)
        return _same_for_readers(allocate(_elbows_first(costs, drop), drop), model)

    def spend(self, costs: Curves, model: DecoderHeads) -> tuple[int, ...]:
        """R of each layer with the smallest sum of ``costs`` [caches][G], elbows not looked at."""
        return _same_for_readers(allocate(costs, self.heads_to_drop(model)), model)

    def heads_to_drop(self, model: DecoderHeads) -> int:
        """The fewest KV heads, over all caches, whose keys amount to the share.

        Raises:
            ChaiError: out of reach.
        """
        self.check(model)
        caches = len(model.cache_layers)
        whole = model.kv_elements_per_token(model.all_kept) / model.head_dim
        # The small term keeps a share such as 3/8 from asking for one head more because of its last bit.
        drop = max(0, math.ceil(self.share * whole - 1e-6))
        return min(drop, caches * (model.num_kv_heads - 1))


@dataclass(frozen=True)
class Numbers:
    """Numbers given by the user or by another clusters.json."""

    clusters: Clusters

    def check(self, model: DecoderHeads) -> None:
        """Raise ChaiError when the numbers do not fit the model."""
        self.clusters.check(model)

    def choose(self, curves: Curves, model: DecoderHeads) -> tuple[int, ...]:
        """See :class:`KeepRule`."""
        self.check(model)
        return self.clusters.kept_heads


def _by_cache(curves: Curves, model: DecoderHeads) -> Curves:
    """One cost curve per cache: the sum over the layers that read it, since one R serves them all."""
    table = np.asarray(curves, dtype=np.float64)
    groups = readers(model.kv_source_layers, model.num_layers)
    return [table[members].sum(axis=0).tolist() for members in groups]


def _same_for_readers(kept: Sequence[int], model: DecoderHeads) -> tuple[int, ...]:
    """R of each layer from R of each cache."""
    return tuple(for_each_layer(kept, model.kv_source_layers, model.num_layers))


def allocate(costs: Curves, drop: int) -> tuple[int, ...]:
    """Drop exactly ``drop`` heads so that the sum of costs over the layers is smallest.

    Args:
        costs: [L][G]; costs[l][k-1] is what layer l costs with k heads kept. Any costs that add up over the
            layers, the error curves among them.
        drop: heads to drop in total, 0 … L·(G-1).

    Returns:
        Heads kept per layer. Of equal sums the one that drops later layers first.
    """
    table = np.asarray(costs, dtype=np.float64)
    layers, groups = table.shape
    if not 0 <= drop <= layers * (groups - 1):
        raise ValueError(f"cannot drop {drop} heads of {layers} layers with {groups} KV heads")
    by_drop = table[:, ::-1]  # column d: the cost with d heads dropped
    best = np.full(drop + 1, np.inf)
    best[0] = 0.0
    choices = []
    for layer in range(layers):
        options = np.full((groups, drop + 1), np.inf)
        for dropped in range(min(groups - 1, drop) + 1):
            options[dropped, dropped:] = best[: drop + 1 - dropped] + by_drop[layer, dropped]
        # Reversed, the first minimum is the one that drops most here: earlier layers are spared on a tie.
        choices.append(options[::-1].argmin(axis=0))
        best = options.min(axis=0)
    kept = []
    left = drop
    for choice in reversed(choices):
        dropped = groups - 1 - int(choice[left])
        kept.append(groups - dropped)
        left -= dropped
    return tuple(reversed(kept))


def _elbows_first(curves: Curves, drop: int) -> Curves:
    """The costs without the choices that the elbows forbid for this many heads."""
    elbows = [elbow(curve) for curve in curves]
    past = sum(len(curve) - kept for curve, kept in zip(curves, elbows, strict=True))
    return [
        [
            cost if (kept >= limit if drop <= past else kept <= limit) else math.inf
            for kept, cost in enumerate(curve, start=1)
        ]
        for curve, limit in zip(curves, elbows, strict=True)
    ]


def _rounded_down(share: float) -> str:
    return f"{math.floor(share * 10000) / 10000:g}"
