"""The cases of chai::SharedClusteredHeadAttention: each case of the first op, read by a second layer.

The caches are what the producer's reference leaves, undefined places included; the consumer has queries,
maps, sinks and slopes of its own. What it must not read is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.op.attend import HeadTerms, Tensor
from chai_export.op.case_inputs import keep_rounding_margin
from chai_export.op.cases import CACHES, CASES, TERM_CASES, Case, widened
from chai_export.op.comparison import check_output
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
        """The inputs that the case has, by name, T being ``dtype`` (float32, float16 or bfloat16)."""
        return _make_inputs(self.producer, dtype)

    def reference(
        self, inputs: Mapping[str, Tensor], compute_dtype: Any = np.float64
    ) -> SharedAttentionResult:
        """The reference result for these inputs, by default with float64 arithmetic."""
        scales = {name: inputs.get(name) for name in ("key_scales", "value_scales")}
        return shared_clustered_head_attention(
            **{**inputs, **scales},  # type: ignore[arg-type]
            attributes=self.producer.attributes,
            compute_dtype=compute_dtype,
        )


SHARED_CASES: tuple[SharedCase, ...] = tuple(map(SharedCase, CASES))
SHARED_TERM_CASES: tuple[SharedCase, ...] = tuple(map(SharedCase, TERM_CASES))


def check_shared(
    case: SharedCase, inputs: Mapping[str, Tensor], result: SharedAttentionResult, dtype: str = "float32"
) -> None:
    """Compare one implementation's result with the reference: the map exactly, the output in tolerance.

    Raises:
        AssertionError: naming the case, the output and the worst difference.
    """
    exact = case.reference(widened(inputs))
    actual, wanted = np.asarray(result.present_head_map), exact.present_head_map
    assert np.array_equal(actual, wanted), (
        f"{case.name}: present_head_map is {actual.tolist()}, expected {wanted.tolist()}"
    )
    check_output(case.name, result.output, exact.output, inputs["lengths"], dtype)


def _make_inputs(case: Case, dtype: str) -> dict[str, Tensor]:
    before = case.inputs(dtype)
    after = case.reference(before)
    rng = np.random.default_rng([*(ord(letter) for letter in case.name), 1])
    element = ELEMENT_TYPES[dtype].numpy
    query = rng.standard_normal(before["query"].shape).astype(element)[:, case.patterns()]
    query = np.ascontiguousarray(query)
    key, value = before["key"].copy(), before["value"].copy()
    terms = HeadTerms(
        rng.standard_normal(case.heads).astype(element) if case.sinks else None,
        (2.0 ** -rng.uniform(1, 6, case.heads)).astype(np.float32) if case.slopes else None,
    )
    past_head_map = np.empty((len(case.rows), case.heads), dtype=np.int32)
    for b, (_, new) in enumerate(case.rows):
        probe = min(case.attributes.probe_tokens, new) if case.is_fresh(b) else 0
        if probe:
            keep_rounding_margin(rng, case, query[b], key[b], terms, probe)
            past_head_map[b] = -7  # not to be read
        else:
            past_head_map[b] = _random_map(rng, case, after.present_head_map[b])
        for unread in (key, value):
            unread[b, :, probe:] = np.nan
        query[b, :, new:] = np.nan
    named = {"sinks": terms.sinks, "alibi_slopes": terms.slopes}
    return {
        "query": query,
        "key": key,
        "value": value,
        **{name: getattr(after, name) for name in CACHES if name in before},
        "page_table": before["page_table"],
        "kept_head_map": after.present_head_map,
        "past_head_map": past_head_map,
        "past_lengths": before["past_lengths"],
        "lengths": before["lengths"],
        **{name: term for name, term in named.items() if term is not None},
    }


def _random_map(rng: np.random.Generator, case: Case, kept_head_map: NDArray[np.int32]) -> NDArray[np.int32]:
    """A map on the kept KV heads, by random distances; half of the time one of them goes unused."""
    kept = kept_kv_heads(kept_head_map, case.heads // case.kv_heads)
    if len(kept) > 1 and rng.random() < 0.5:
        kept.pop(int(rng.integers(len(kept))))
    points = rng.integers(0, 1000, size=case.heads)
    distance: NDArray[Any] = np.abs(points[:, None] - points[None, :]).astype(np.int64)
    return assign(distance, case.kv_heads, kept)
