"""The cases that every implementation of the op is tested with, and the check of one result.

A case names shapes and, per row, (past length, new tokens). Its inputs are made from a seed in a way that no
implementation may be lucky with: everything the op must not read is NaN, everything it must not write is
compared afterwards bit by bit. NumPy only, so that the suite runs wherever an implementation does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.head_map import (
    QUANTISATION_STEPS,
    cluster_heads,
    kept_kv_heads,
    probe_probabilities,
)
from chai_export.op.probe import PAPER_PROBE_TOKENS
from chai_export.op.reference import AttentionResult, clustered_head_attention

Tensor = NDArray[Any]

RELATIVE_TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest |difference| to the float64 reference, as a share of the largest |reference| of the case."""

LEAST_OUTPUT = 0.02
"""Outputs smaller than this are allowed the differences of this one: values are drawn with a deviation of 1,
so that they nearly cancel out there, and what is left of them has their rounding errors."""

ROUNDING_MARGIN = 1e-3
"""Probe probabilities keep this distance (in quantisation steps) from where rounding flips, so that float32
sums in another order cannot change a head map."""


@dataclass(frozen=True)
class Case:
    """One call of the op: shapes, rows and how the heads relate.

    ``rows`` holds (past length, new tokens) per batch row. ``twins`` > 0 gives the query heads only that many
    distinct patterns, so distances tie exactly. ``tokens`` (S) defaults to the longest row.
    """

    name: str
    heads: int
    kv_heads: int
    kept: int
    rows: tuple[tuple[int, int], ...]
    head_dim: int = 16
    value_dim: int = 0
    tokens: int = 0
    capacity: int = 24
    probe_tokens: int = PAPER_PROBE_TOKENS
    online: bool = True
    scale: float = 0.0
    twins: int = 0

    def inputs(self, dtype: str = "float32") -> dict[str, Tensor]:
        """The eight inputs by name, the float ones in ``dtype`` (float32, float16 or bfloat16)."""
        return _make_inputs(self, ELEMENT_TYPES[dtype].numpy)

    def patterns(self) -> NDArray[np.int64]:
        """int64 [H]: query heads of one number are twins, equal in every probe."""
        group = self.heads // self.kv_heads
        return np.arange(self.heads) // group % self.twins if self.twins else np.arange(self.heads)

    def attributes(self) -> dict[str, float | int]:
        """The node attributes, all of them, as ONNX wants them."""
        return {"scale": self.scale, "probe_tokens": self.probe_tokens, "online": int(self.online)}

    def reference(self, inputs: Mapping[str, Tensor], compute_dtype: type = np.float64) -> AttentionResult:
        """The reference result for these inputs, by default with float64 arithmetic."""
        return clustered_head_attention(
            **inputs,
            scale=self.scale,
            probe_tokens=self.probe_tokens,
            online=self.online,
            compute_dtype=compute_dtype,
        )


def _shapes() -> list[Case]:
    """R = 1 … G for multi-head, grouped-query and multi-query heads; sequence lengths around the probe."""
    cases = []
    for heads, kv_heads in ((4, 4), (8, 2), (4, 1), (6, 3)):
        for kept in range(1, kv_heads + 1):
            rows = ((0, 9), (7, 3))
            cases.append(Case(f"h{heads}_g{kv_heads}_r{kept}", heads, kv_heads, kept, rows))
    for tokens in (1, 4, 5, 6):
        cases.append(Case(f"fresh_s{tokens}", 6, 6, 3, ((0, tokens),)))
        cases.append(Case(f"continue_s{tokens}", 6, 6, 3, ((11, tokens), (1, tokens))))
    return cases


CASES: tuple[Case, ...] = (
    *_shapes(),
    Case("decode_one_row", 8, 8, 3, ((15, 1),)),
    Case("decode_batch", 8, 4, 2, ((15, 1), (3, 1), (0, 1), (23, 1))),
    Case("fills_capacity", 4, 4, 2, ((20, 4), (0, 4))),
    Case("mixed_phases", 8, 4, 2, ((0, 7), (9, 1), (4, 5), (6, 0), (0, 2), (0, 0))),
    Case("inactive_past_capacity", 4, 4, 2, ((22, 0), (0, 6), (30, 0))),
    Case("right_padding", 4, 2, 1, ((0, 3), (5, 2), (0, 6)), tokens=10),
    Case("all_rows_inactive", 4, 4, 2, ((3, 0), (0, 0)), tokens=2),
    Case("value_dim_larger", 6, 3, 2, ((0, 8), (5, 2)), head_dim=8, value_dim=24),
    Case("value_dim_smaller", 6, 6, 2, ((0, 8), (5, 2)), head_dim=32, value_dim=8),
    Case("scale_given", 4, 4, 2, ((0, 8), (5, 2)), scale=0.35),
    Case("offline", 6, 3, 2, ((0, 8), (5, 2), (0, 3)), online=False),
    Case("probe_one", 6, 6, 3, ((0, 8), (5, 2)), probe_tokens=1),
    Case("probe_long", 6, 6, 3, ((0, 20), (0, 11)), probe_tokens=16),
    Case("twins_exact_ties", 8, 8, 3, ((0, 9), (0, 6)), twins=3),
    Case("twins_more_kept_than_distinct", 8, 8, 6, ((0, 9), (4, 3)), twins=2),
    Case("all_heads_equal", 6, 6, 2, ((0, 7),), twins=1),
    Case("twins_grouped", 8, 4, 3, ((0, 9),), twins=4),
    Case("mutually_nearest_pair", 2, 2, 1, ((0, 6), (3, 1))),
    Case("long_prefill", 8, 4, 2, ((0, 150), (40, 117)), capacity=170, head_dim=32),
    Case("long_cache", 8, 8, 3, ((700, 1), (333, 1)), capacity=720, head_dim=64),
    Case("long_cache_chunk", 4, 4, 2, ((300, 33),), capacity=340, head_dim=128),
    Case("many_heads", 40, 40, 9, ((0, 7), (12, 1)), head_dim=32),
    Case("odd_head_dim", 5, 5, 2, ((0, 7), (12, 3)), head_dim=20, value_dim=12),
)


def check(case: Case, inputs: Mapping[str, Tensor], result: AttentionResult, dtype: str = "float32") -> None:
    """Compare one implementation's result with the reference.

    ``inputs`` are the inputs as they were before the call. The head map must be identical, the output within
    the dtype's tolerance, the caches bit for bit: new rows, rows that were there, and bytes that the op has
    no business with (unused slots, positions past the new rows) alike.

    Raises:
        AssertionError: naming the case, the output and the worst difference.
    """
    expected = case.reference(inputs)
    actual_map, wanted_map = np.asarray(result.present_head_map), expected.present_head_map
    assert np.array_equal(actual_map, wanted_map), (
        f"{case.name}: present_head_map is {actual_map.tolist()}, expected {wanted_map.tolist()}"
    )
    for name in ("present_key", "present_value"):
        actual, wanted = np.asarray(getattr(result, name)), getattr(expected, name)
        assert actual.dtype == wanted.dtype, f"{case.name}: {name} is {actual.dtype}, expected {wanted.dtype}"
        assert actual.shape == wanted.shape, f"{case.name}: {name} is {actual.shape}, expected {wanted.shape}"
        different = _bits(actual) != _bits(wanted)
        assert not different.any(), (
            f"{case.name}: {name} differs in {int(different.sum())} elements, first at "
            f"{np.argwhere(different)[0].tolist()}"
        )
    exact = case.reference({k: widen(v) for k, v in inputs.items()})
    check_output(case.name, result.output, exact.output, inputs["lengths"], dtype)


def check_output(name: str, output: Tensor, exact: Tensor, lengths: Tensor, dtype: str) -> None:
    """Compare attended values [B,S,H*Dv] with the float64 ``exact`` ones; padded tokens must be zero.

    Raises:
        AssertionError: naming the case and the worst difference.
    """
    wanted = exact.astype(np.float64)
    actual = np.asarray(output).astype(np.float64)
    assert actual.shape == wanted.shape, f"{name}: output is {actual.shape}, expected {wanted.shape}"
    worst = np.abs(actual - wanted).max(initial=0.0)
    limit = RELATIVE_TOLERANCE[dtype] * max(np.abs(wanted).max(initial=0.0), LEAST_OUTPUT)
    assert worst <= limit, f"{name}: output differs by {worst:.3g}, allowed {limit:.3g}"
    padded = np.arange(actual.shape[1])[None, :] >= lengths[:, None]
    assert not actual[padded].any(), f"{name}: output is not zero in padded tokens"


def widen(tensor: Tensor) -> Tensor:
    """Float tensors as float64 (the head map still computes in float32 from the same values)."""
    return tensor if np.issubdtype(tensor.dtype, np.integer) else tensor.astype(np.float64)


def _bits(tensor: Tensor) -> Tensor:
    """The same bytes as unsigned integers: NaN compares equal to itself."""
    return np.ascontiguousarray(tensor).view(np.dtype(f"u{tensor.dtype.itemsize}"))


def _make_inputs(case: Case, dtype: np.dtype[Any]) -> dict[str, Tensor]:
    rng = np.random.default_rng([ord(letter) for letter in case.name])
    batch, tokens = len(case.rows), case.tokens or max(new for _, new in case.rows)
    value_dim = case.value_dim or case.head_dim

    def draw(*shape: int) -> Tensor:
        return rng.standard_normal(shape).astype(dtype)

    query = draw(batch, case.heads, tokens, case.head_dim)
    key = draw(batch, case.kv_heads, tokens, case.head_dim)
    value = draw(batch, case.kv_heads, tokens, value_dim)
    if case.twins:
        key = np.ascontiguousarray(key[:, np.arange(case.kv_heads) % case.twins])
        query = np.ascontiguousarray(query[:, case.patterns()])
    past_key = draw(batch, case.kept, case.capacity, case.head_dim)
    past_value = draw(batch, case.kv_heads, case.capacity, value_dim)
    past_head_map = np.stack([_random_map(rng, case) for _ in range(batch)])
    group = case.heads // case.kv_heads
    for b, (past, new) in enumerate(case.rows):
        if case.online and past == 0 and new > 0:
            keep_rounding_margin(rng, case, query[b], key[b], min(case.probe_tokens, new))
            past_head_map[b] = -7  # not to be read
            past_key[b] = np.nan
        else:
            past_key[b, len(kept_kv_heads(past_head_map[b], group)) :] = np.nan
        for cache in (past_key, past_value):
            cache[b, :, past:] = np.nan
        for new_rows in (query, key, value):
            new_rows[b, :, new:] = np.nan
    return {
        "query": query,
        "key": key,
        "value": value,
        "past_key": past_key,
        "past_value": past_value,
        "past_head_map": past_head_map,
        "past_lengths": np.array([past for past, _ in case.rows], dtype=np.int32),
        "lengths": np.array([new for _, new in case.rows], dtype=np.int32),
    }


def _random_map(rng: np.random.Generator, case: Case) -> NDArray[np.int32]:
    """A valid map of random distances; half of the time one slot stays unused."""
    points = rng.integers(0, 1000, size=case.heads)
    distance = np.abs(points[:, None] - points[None, :]).astype(np.int64)
    used = case.kept - int(case.kept > 1 and rng.random() < 0.5)
    return cluster_heads(distance, case.kv_heads, used)


def keep_rounding_margin(
    rng: np.random.Generator, case: Case, query: Tensor, key: Tensor, probe: int
) -> None:
    """Redraw single probe queries, in place, until no probability is near a rounding boundary."""
    scale = case.scale or case.head_dim**-0.5
    pattern = case.patterns()
    while True:
        steps = probe_probabilities(query[:, :probe], key[:, :probe], scale) * QUANTISATION_STEPS
        to_boundary = np.abs(steps - np.floor(steps) - 0.5)
        unsafe = np.argwhere((to_boundary < ROUNDING_MARGIN).any(axis=2))
        if not len(unsafe):
            return
        for head, token in unsafe:
            twins = np.flatnonzero(pattern == pattern[head])
            query[twins, token] = rng.standard_normal(case.head_dim).astype(query.dtype)
