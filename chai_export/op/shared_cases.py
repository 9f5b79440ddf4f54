"""The cases of chai::SharedClusteredHeadAttention: each case of the first op, read by a second layer.

The caches are what the producer's reference leaves, undefined places included; the consumer has queries and
maps of its own. What it must not read is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.op.cases import (
    CASES,
    Case,
    Tensor,
    check_output,
    keep_rounding_margin,
    widen,
)
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.head_map import assign, kept_kv_heads
from chai_export.op.shared_reference import SharedAttentionResult, shared_clustered_head_attention


@dataclass(frozen=True)
class SharedCase:
    """One call of the op after a call of the producer."""

    producer: Case

    @property
    def name(self) -> str:
        """The producer's."""
        return self.producer.name

    def inputs(self, dtype: str = "float32") -> dict[str, Tensor]:
        """The eight inputs by name, the float ones in ``dtype`` (float32, float16 or bfloat16)."""
        return _make_inputs(self.producer, dtype)

    def reference(
        self, inputs: Mapping[str, Tensor], compute_dtype: type = np.float64
    ) -> SharedAttentionResult:
        """The reference result for these inputs, by default with float64 arithmetic."""
        return shared_clustered_head_attention(
            **inputs,
            scale=self.producer.scale,
            probe_tokens=self.producer.probe_tokens,
            online=self.producer.online,
            compute_dtype=compute_dtype,
        )


SHARED_CASES: tuple[SharedCase, ...] = tuple(map(SharedCase, CASES))


def check_shared(
    case: SharedCase, inputs: Mapping[str, Tensor], result: SharedAttentionResult, dtype: str = "float32"
) -> None:
    """Compare one implementation's result with the reference: the map exactly, the output in tolerance.

    Raises:
        AssertionError: naming the case, the output and the worst difference.
    """
    exact = case.reference({name: widen(value) for name, value in inputs.items()})
    actual, wanted = np.asarray(result.present_head_map), exact.present_head_map
    assert np.array_equal(actual, wanted), (
        f"{case.name}: present_head_map is {actual.tolist()}, expected {wanted.tolist()}"
    )
    check_output(case.name, result.output, exact.output, inputs["lengths"], dtype)


def _make_inputs(case: Case, dtype: str) -> dict[str, Tensor]:
    before = case.inputs(dtype)
    after = case.reference(before)
    rng = np.random.default_rng([*(ord(letter) for letter in case.name), 1])
    shape = before["query"].shape
    query = rng.standard_normal(shape).astype(ELEMENT_TYPES[dtype].numpy)[:, case.patterns()]
    query = np.ascontiguousarray(query)
    key = before["key"].copy()
    past_head_map = np.empty((len(case.rows), case.heads), dtype=np.int32)
    for b, (past, new) in enumerate(case.rows):
        if case.online and past == 0 and new > 0:
            probe = min(case.probe_tokens, new)
            keep_rounding_margin(rng, case, query[b], key[b], probe)
            past_head_map[b] = -7  # not to be read
        else:
            probe = 0
            past_head_map[b] = _random_map(rng, case, after.present_head_map[b])
        key[b, :, probe:] = np.nan
        query[b, :, new:] = np.nan
    return {
        "query": query,
        "key": key,
        "key_cache": after.present_key,
        "value_cache": after.present_value,
        "kept_head_map": after.present_head_map,
        "past_head_map": past_head_map,
        "past_lengths": before["past_lengths"],
        "lengths": before["lengths"],
    }


def _random_map(rng: np.random.Generator, case: Case, kept_head_map: NDArray[np.int32]) -> NDArray[np.int32]:
    """A map on the kept KV heads, by random distances; half of the time one of them goes unused."""
    kept = kept_kv_heads(kept_head_map, case.heads // case.kv_heads)
    if len(kept) > 1 and rng.random() < 0.5:
        kept.pop(int(rng.integers(len(kept))))
    points = rng.integers(0, 1000, size=case.heads)
    distance: NDArray[Any] = np.abs(points[:, None] - points[None, :]).astype(np.int64)
    return assign(distance, case.kv_heads, kept)
