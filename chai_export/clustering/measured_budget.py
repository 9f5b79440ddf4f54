"""Budgets by measured damage: what each layer costs in KL divergence when it alone shares scores.

Error curves say how much the probe's probabilities move, not how much the model minds. Here the model is
asked: one layer at a time keeps R heads and all others keep everything, and the divergence from the model
with all heads is measured. Allocation then minimises the sum over the layers, exactly, by dynamic
programming (:func:`chai_export.clustering.keep.allocate`).

The sum assumes independence: that the damage of several layers is the sum of what each does alone. It is
a ranking that is needed, not a forecast; ``docs/quality.md`` shows how well the sum predicts.

Past the elbows damage is so small that a few sequences cannot rank it: one map in a hundred that fails is
most of it, and none may be among them. The error curves come from a hundred times as many sequences, so
there they have a say (:func:`spend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chai_export.clustering.keep import Budget, elbow
from chai_export.models.logits import total_kl
from chai_export.op.heads import DecoderHeads
from chai_export.op.kv_sharing import for_each_layer, readers
from chai_export.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_PER_LAYER = 8
"""Numbers of heads tried per layer, besides all of them; the rest is interpolated along the error curve."""

CURVE_WEIGHT = 2.0
"""How much the error curves count past the elbows, in units of the damage measured there. On the demo model 0
loses more KL than the curves alone at 10 % of bytes saved (.0009 nats against .0003: one failed map) and at
15 %, and 2 no more at any budget of docs/quality.md. Budgets beyond the elbows are the same with both."""


def spend(
    budget: Budget,
    damage: Sequence[Sequence[float]],
    error_curves: Sequence[Sequence[float]],
    model: DecoderHeads,
) -> tuple[int, ...]:
    """R of each layer: the allocation of a budget with the smallest sum of damage.

    Args:
        budget: what to save.
        damage: [L][G], see :func:`measure_damage`.
        error_curves: [L][G], of the same calibration.
        model: of the model.
    """
    caches = readers(model.kv_source_layers, model.num_layers)
    curves = [np.asarray(error_curves)[layers].sum(axis=0) for layers in caches]
    return budget.spend(_steadied([damage[layers[0]] for layers in caches], curves), model)


def _steadied(damage: Sequence[Sequence[float]], curves: Sequence[NDArray[np.float64]]) -> list[list[float]]:
    """Damage with the error curves added past the elbows; before them, one number for a whole layer."""
    elbows = [elbow(curve.tolist()) for curve in curves]
    moved = sum(float(curve[at - 1 :].sum()) for curve, at in zip(curves, elbows, strict=True))
    cost = sum(sum(row[at - 1 :]) for row, at in zip(damage, elbows, strict=True))
    unit = CURVE_WEIGHT * cost / moved if moved > 0 else 0.0
    return [
        [nats + unit * float(curve[max(index, at - 1)]) for index, nats in enumerate(row)]
        for row, curve, at in zip(damage, curves, elbows, strict=True)
    ]


def measure_damage(
    model: PreTrainedModel,
    windows: NDArray[np.int32],
    error_curves: Sequence[Sequence[float]],
    *,
    probe_tokens: int,
    per_layer: int = MEASURED_PER_LAYER,
    sources: Sequence[int] | None = None,
) -> tuple[tuple[float, ...], ...]:
    """KL divergence of each layer for each number of kept heads, the other layers keeping all.

    Runs ``windows · layers · per_layer`` forward passes; one window's logits exist at a time.

    Args:
        model: a supported decoder.
        windows: int32 [N, T], sequences.
        error_curves: [L][G], which decide where to measure and how to interpolate.
        probe_tokens: P.
        per_layer: numbers of heads to try in each layer, at least 1; from G-1 on, every one.
        sources: for each layer the one whose cache it reads; layers of one cache keep as many heads and are
            measured together. None if each has its own.

    Returns:
        [L][G]: nats per token with k heads kept at [l][k-1], never rising along a layer, 0 at the end. Layers
        of one cache have the same row, which is what they cost together.
    """
    from chai_export.models.oracle import Oracle, model_logits

    groups = len(error_curves[0])
    caches = readers(sources, len(error_curves))
    curves = [np.asarray(error_curves)[layers].sum(axis=0).tolist() for layers in caches]
    sums = [dict.fromkeys(heads_to_try(curve, per_layer), 0.0) for curve in curves]
    for window in track(windows, "measuring layers", total=len(windows)):
        every = model_logits(model, window)
        for layers, by_kept in zip(caches, sums, strict=True):
            for kept in by_kept:
                kept_heads = [kept if layer in layers else groups for layer in range(len(error_curves))]
                by_kept[kept] += total_kl(every, Oracle(model, kept_heads, probe_tokens).logits(window))
    positions = max(1, windows.size)
    of_caches = [
        _filled({kept: total / positions for kept, total in by_kept.items()}, curve)
        for by_kept, curve in zip(sums, curves, strict=True)
    ]
    return tuple(for_each_layer(of_caches, sources, len(error_curves)))


def heads_to_try(curve: Sequence[float], count: int) -> list[int]:
    """Up to ``count`` numbers of kept heads worth measuring, ascending; G itself costs nothing.

    One head, both sides of the elbow, then whatever halves the widest gap.
    """
    groups = len(curve)
    at_elbow = elbow(curve)
    wanted = [kept for kept in (1, at_elbow, at_elbow - 1) if 1 <= kept < groups]
    tried = sorted(set(wanted[:count]))
    while len(tried) < min(count, groups - 1):
        bounds = [0, *tried, groups]
        low, high = max(pairwise(bounds), key=lambda gap: gap[1] - gap[0])
        tried = sorted([*tried, (low + high) // 2])
    return tried


def predicted(costs: Sequence[Sequence[float]], kept_heads: Sequence[int]) -> float:
    """What the sum of the layers' costs predicts for an allocation, nats per token."""
    return float(sum(row[kept - 1] for row, kept in zip(costs, kept_heads, strict=True)))


def _filled(measured: dict[int, float], curve: Sequence[float]) -> tuple[float, ...]:
    """Every number of heads: between two measured ones in proportion to the error curve."""
    groups = len(curve)
    known = {**measured, groups: 0.0}
    marks = sorted(known)
    costs = np.zeros(groups)
    for low, high in pairwise(marks):
        for kept in range(low, high + 1):
            span = curve[low - 1] - curve[high - 1]
            share = (curve[kept - 1] - curve[high - 1]) / span if span > 0 else (high - kept) / (high - low)
            costs[kept - 1] = known[high] + share * (known[low] - known[high])
    for kept in range(1, marks[0]):
        costs[kept - 1] = known[marks[0]]
    # Keeping more heads cannot do more damage; where noise says so, the larger number counts for both.
    falling = np.maximum.accumulate(costs[::-1])[::-1]
    return tuple(float(cost) for cost in falling)
