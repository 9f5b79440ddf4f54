"""What the op of this project runs: fixed bits, CHAI's heads by several rules, and plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chai_export.clustering.equaliser import Equalisers, equalisers
from chai_export.clustering.plan import LayerPlan, Plan
from chai_export.clustering.plan_tradeoff import best_choices, option_table, storage_of
from chai_export.errors import ChaiError
from chai_export.models.attention import LayerFunction
from chai_export.models.oracle import clustered_attention, op_head_map
from chai_export.models.scoring import Scoring
from chai_export.models.stored_rows import StoredRounding, read_back
from chai_export.op.attributes import DEFAULT_GROUP
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.op.heads import DecoderHeads
from chai_export.op.probe import MEASURED_PROBE_TOKENS
from chai_export.quality.clustered_run import ChooseMap, probe
from chai_export.quality.methods_medoids import HeadMap
from chai_export.quality.scoreboard.method import CacheMethod, float16_bytes

_NEAREST = StoredRounding()


def planned(plan: Plan, heads: DecoderHeads, share: float) -> CacheMethod:
    """The plan of least loss within a share of float16's bytes, from the measurements of ``plan``.

    Raises:
        ChaiError: the plan has no measurements, or the share is out of reach.
    """
    if plan.measured is None:
        raise ChaiError(f"{plan.origin} has no measurements; calibrate again")
    limit = share * float16_bytes(heads, 1)
    try:
        choice = best_choices(plan.measured, heads, _group(plan)).within_bytes(limit)
    except ValueError:
        raise ChaiError(
            f"no plan takes {share:.0%} of float16's bytes or less; give a larger share"
        ) from None
    table = option_table(plan.measured)
    layers = [table[option] for option in choice]
    return _by_layers("plan", f"within {share:.0%}", layers, heads, plan)


def fixed_bits(plan: Plan, heads: DecoderHeads, key_bits: int, value_bits: int) -> CacheMethod:
    """All heads in the same bits everywhere; 4-bit keys with the equaliser of the plan."""
    layer = LayerPlan(kept_heads=heads.num_kv_heads, key_bits=key_bits, value_bits=value_bits)
    return _by_layers("bits", f"{key_bits}/{value_bits}", [layer] * heads.num_layers, heads, plan)


def chai(
    name: str, heads: DecoderHeads, kept: Sequence[int], choose: ChooseMap, exact: int, *, on_op: bool
) -> CacheMethod:
    """CHAI (arXiv 2403.08058): keys of representatives only, all values, float16."""
    storage = CacheStorage(heads, Dtype.FLOAT16, (16,) * heads.num_layers, (16,) * heads.num_layers)
    setting = f"{sum(kept)} of {heads.num_layers * heads.num_kv_heads} heads' keys"
    return CacheMethod(
        name, setting, _attend(storage, {}, choose, exact), _bytes_of(storage, kept), on_op=on_op
    )


def op_maps(kept: Sequence[int], probe_tokens: int) -> ChooseMap:
    """The op's own rule (docs/op.md)."""

    def choose(layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> HeadMap:
        return op_head_map(probe(query, key, scoring, probe_tokens, causal=True), key.shape[1], kept[layer])

    return choose


def _group(plan: Plan) -> int:
    return plan.group or DEFAULT_GROUP


def _by_layers(
    name: str, setting: str, layers: Sequence[LayerPlan], heads: DecoderHeads, plan: Plan
) -> CacheMethod:
    try:
        storage = storage_of(layers, heads, _group(plan))
    except ValueError as error:
        raise ChaiError(f"these bits do not fit this model: {error}") from None
    kept = [layer.kept_heads for layer in layers]
    factors = equalisers(plan.key_peaks, storage.key_bits)
    probe_tokens = plan.probe_tokens or MEASURED_PROBE_TOKENS
    attend = _attend(storage, factors, op_maps(kept, probe_tokens), probe_tokens)
    return CacheMethod(name, setting, attend, _bytes_of(storage, kept), on_op=True)


def _attend(storage: CacheStorage, factors: Equalisers, choose: ChooseMap, exact: int) -> LayerFunction:
    """Rows as the op stores them, scores shared as ``choose`` says, the first ``exact`` tokens exact."""

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        head_map = torch.from_numpy(choose(index, query, key, scoring)).long()
        own = factors.get(index)
        divisor = torch.ones(()) if own is None else torch.from_numpy(own[:, None])
        keys = read_back(key / divisor, storage.key(index), _NEAREST) * divisor
        values = read_back(value, storage.value(index), _NEAREST)
        first = min(exact, query.shape[2])
        return clustered_attention(query, key, value, head_map, scoring, first, (keys, values))

    return attend


def _bytes_of(storage: CacheStorage, kept: Sequence[int]) -> Callable[[int], float]:
    token = sum(storage.layer_bytes(layer, count).total for layer, count in enumerate(kept))
    return lambda tokens: float(tokens * token)
