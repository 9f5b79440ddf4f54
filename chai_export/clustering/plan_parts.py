"""What each part of a plan takes off the cache: bits of values, bits of keys, then heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chai_export.clustering.plan import LayerPlan, Plan
from chai_export.clustering.plan_tradeoff import storage_of
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.op.heads import DecoderHeads

_EXACT_BITS = 16


@dataclass(frozen=True)
class PlanParts:
    """Shares of float16's cache with all heads that a plan saves.

    What keys in fewer bits save is counted with all heads, what heads save with the bits that they have then.
    """

    values: float
    keys: float
    heads: float


def plan_parts(plan: Plan, heads: DecoderHeads) -> PlanParts:
    """The parts of a plan for a model with such heads."""
    every = heads.num_kv_heads
    values = [LayerPlan(kept_heads=every, key_bits=_EXACT_BITS, value_bits=p.value_bits) for p in plan.layers]
    keys = [LayerPlan(kept_heads=every, key_bits=p.key_bits, value_bits=p.value_bits) for p in plan.layers]
    whole = CacheStorage.exact(heads, Dtype.FLOAT16).token_bytes(heads.all_kept).total
    left = [1.0, *(_bytes(layers, plan, heads) / whole for layers in (values, keys, plan.layers))]
    return PlanParts(left[0] - left[1], left[1] - left[2], left[2] - left[3])


def part_sentences(plan: Plan, heads: DecoderHeads) -> list[str]:
    """The parts in words: ``heads: none redundant``, ``values in 4 bits: -31%``."""
    parts = plan_parts(plan, heads)
    return [
        _of_heads(plan, heads, parts.heads),
        f"keys in {_bits(plan.key_bits)} bits: {-parts.keys:.0%}",
        f"values in {_bits(plan.value_bits)} bits: {-parts.values:.0%}",
    ]


def _of_heads(plan: Plan, heads: DecoderHeads, saved: float) -> str:
    if heads.num_kv_heads == 1:
        return "heads: one KV head per layer, nothing to share"
    if set(plan.kept_heads) == {heads.num_kv_heads}:
        return "heads: none redundant"
    kept = sum(plan.kept_heads) / (len(plan.kept_heads) * heads.num_kv_heads)
    text = f"heads: {kept:.0%} of keys kept: {-saved:.0%}"
    if plan.kv_bytes_share_every_head is not None:
        text += f" (with every head {1 / plan.kv_bytes_share_every_head:.2f} times)"
    return text


def _bits(of_layers: Sequence[int]) -> str:
    """``4``, or ``8 and 4`` where layers differ."""
    return " and ".join(map(str, sorted(set(of_layers), reverse=True)))


def _bytes(layers: Sequence[LayerPlan], plan: Plan, heads: DecoderHeads) -> int:
    storage = storage_of(layers, heads, plan.group or 2)
    return storage.token_bytes([layer.kept_heads for layer in layers]).total
