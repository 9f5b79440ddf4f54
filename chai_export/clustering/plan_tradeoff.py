"""All best plans that a measurement knows of: bytes against expected loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chai_export.clustering.allocation import Choice, Frontier
from chai_export.clustering.correction import Correction
from chai_export.clustering.plan import LayerPlan, Measurement, Plan
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.op.heads import DecoderHeads

_POINTS = 32


def option_table(measured: Measurement) -> list[LayerPlan]:
    """The options in the order of the flattened damage."""
    return [
        LayerPlan(kept_heads=kept, key_bits=key, value_bits=value)
        for kept in measured.kept_heads
        for key in measured.key_bits
        for value in measured.value_bits
    ]


def damage_table(measured: Measurement) -> NDArray[np.float64]:
    """float64 [caches, options]."""
    return np.array(measured.damage, np.float64).reshape(len(measured.damage), -1)


def damage_sum(measured: Measurement, choice: Choice) -> float:
    """Sum of damage, nats per token."""
    return float(damage_table(measured)[np.arange(len(choice)), list(choice)].sum())


def storage_of(layers: Sequence[LayerPlan], heads: DecoderHeads, group: int) -> CacheStorage:
    """What the caches of such layers hold; 0 bits count as float16."""
    bits = [layer.key_bits for layer in layers], [layer.value_bits for layer in layers]
    return CacheStorage(heads, Dtype.FLOAT16, *bits, group)


def best_choices(
    measured: Measurement, heads: DecoderHeads, group: int, *, every_head: bool = False
) -> Frontier:
    """All best choices of options; ``every_head``: of those that keep all heads."""
    table = option_table(measured)
    allowed = [
        i for i, option in enumerate(table) if not every_head or option.kept_heads == heads.num_kv_heads
    ]

    def size(option: LayerPlan) -> int:
        storage = storage_of([option] * heads.num_layers, heads, group)
        return storage.layer_bytes(0, option.kept_heads).total

    sizes = [size(table[i]) for i in allowed]
    costs = damage_table(measured)[:, allowed]
    return Frontier([sizes] * len(costs), costs.tolist())


def tradeoff(plan: Plan) -> list[dict[str, float]]:
    """Expected loss of the best plans, smallest first: ``{"kv_bytes_share", "kl", "perplexity_ratio"}``.

    Empty where the plan holds no measurement.
    """
    if plan.measured is None or plan.heads is None or plan.group is None:
        return []
    frontier = best_choices(plan.measured, plan.heads, plan.group)
    correction = Correction(plan.measured.whole_plans)
    whole = CacheStorage.exact(plan.heads, Dtype.FLOAT16).token_bytes(plan.heads.all_kept).total
    points: dict[float, dict[str, float]] = {}
    for limit in np.linspace(frontier.least_bytes, whole, _POINTS):
        choice = frontier.within_bytes(float(limit))
        kl = correction.kl(damage_sum(plan.measured, choice))
        loss = correction.nll_change(kl)
        share = frontier.bytes_of(choice) / whole
        points[share] = {"kv_bytes_share": share, "kl": kl, "perplexity_ratio": float(np.exp(loss))}
    return [points[share] for share in sorted(points)]
