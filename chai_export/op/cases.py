"""The cases that every implementation of the op is tested with, and the check of one result.

A case names shapes and, per row, (past length, new tokens). Its inputs are made from a seed in a way that no
implementation may be lucky with: pages lie in the pool in random order with unused ones between them,
everything the op must not read is NaN (random bytes where codes cannot be NaN), and everything it must not
write is compared afterwards bit by bit. NumPy only, so that the suite runs wherever an implementation does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.op.attributes import Attributes
from chai_export.op.case_inputs import make_inputs
from chai_export.op.comparison import Tensor, check_bits, check_output, widen
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.reference import AttentionResult, clustered_head_attention
from chai_export.op.storage import Storage

CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")


@dataclass(frozen=True)
class Case:
    """One call of the op: shapes, rows and how the heads relate.

    ``rows`` holds (past length, new tokens) per batch row, ``page`` the positions of a page (L) and
    ``capacity`` those that a row may have, rounded up to whole pages. ``twins`` > 0 gives the query heads
    only that many distinct patterns, so distances tie exactly. ``tokens`` (S) defaults to the longest row.
    ``prefix`` (row, other row, pages) lets a row name another's first pages.
    """

    name: str
    heads: int
    kv_heads: int
    kept: int
    rows: tuple[tuple[int, int], ...]
    head_dim: int = 16
    value_dim: int = 0
    tokens: int = 0
    page: int = 8
    capacity: int = 24
    twins: int = 0
    prefix: tuple[tuple[int, int, int], ...] = ()
    sinks: bool = False
    slopes: bool = False
    attributes: Attributes = field(default_factory=Attributes)

    @property
    def storage_k(self) -> Storage:
        """How keys are stored."""
        return Storage(self.attributes.key_bits, self.head_dim, self.attributes.group)

    @property
    def storage_v(self) -> Storage:
        """How values are stored."""
        return Storage(self.attributes.value_bits, self.value_dim or self.head_dim, self.attributes.group)

    def inputs(self, dtype: str = "float32") -> dict[str, Tensor]:
        """The inputs that the case has, by name, T being ``dtype`` (float32, float16 or bfloat16)."""
        return make_inputs(self, ELEMENT_TYPES[dtype].numpy)

    def patterns(self) -> NDArray[np.int64]:
        """int64 [H]: query heads of one number are twins, equal in every probe."""
        group = self.heads // self.kv_heads
        return np.arange(self.heads) // group % self.twins if self.twins else np.arange(self.heads)

    def is_fresh(self, row: int) -> bool:
        """Whether a row decides its map in this call."""
        past, new = self.rows[row]
        return self.attributes.online and past == 0 and new > 0

    def reference(self, inputs: Mapping[str, Tensor], compute_dtype: Any = np.float64) -> AttentionResult:
        """The reference result for these inputs, by default with float64 arithmetic."""
        scales = {name: inputs.get(name) for name in ("key_scales", "value_scales")}
        return clustered_head_attention(
            **{**inputs, **scales},  # type: ignore[arg-type]
            attributes=self.attributes,
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


def _with(case: Case, suffix: str, *, changes: Mapping[str, Any] | None = None, **attributes: Any) -> Case:
    changed = replace(case.attributes, **attributes)
    return replace(case, name=f"{case.name}_{suffix}", attributes=changed, **(changes or {}))


_BASIC = (
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
    Case("scale_given", 4, 4, 2, ((0, 8), (5, 2)), attributes=Attributes(scale=0.35)),
    Case("offline", 6, 3, 2, ((0, 8), (5, 2), (0, 3)), attributes=Attributes(online=False)),
    Case("probe_one", 6, 6, 3, ((0, 8), (5, 2)), attributes=Attributes(probe_tokens=1)),
    Case("probe_long", 6, 6, 3, ((0, 20), (0, 11)), attributes=Attributes(probe_tokens=16)),
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

_PAGE_SIZES = (8, 1, 5, 24)
_EXACT = tuple(
    replace(case, page=_PAGE_SIZES[index % len(_PAGE_SIZES)] if case.capacity < 100 else 32)
    for index, case in enumerate(_BASIC)
)
_BY_NAME = {case.name: case for case in _EXACT}
_PREFIX = Case("shared_prefix", 8, 4, 2, ((16, 3), (19, 1), (0, 4)), prefix=((1, 0, 2),))
_LONG = replace(_BY_NAME["long_cache"], rows=((700, 1), (333, 4)))


def _quantised() -> list[Case]:
    bits = ((16, 16), (8, 8), (8, 4), (4, 4), (0, 4), (8, 0), (4, 8), (16, 8))
    cases = []
    for key_bits, value_bits in bits:
        form = partial(_with, suffix=f"k{key_bits}v{value_bits}", key_bits=key_bits, value_bits=value_bits)
        cases.append(form(_BY_NAME["mixed_phases"], group=8))
        cases.append(form(_PREFIX, group=16))
        cases.append(form(_LONG, group=32))
    for key_bits, value_bits in ((8, 8), (8, 4), (4, 4)):
        form = partial(_with, suffix=f"k{key_bits}v{value_bits}", key_bits=key_bits, value_bits=value_bits)
        cases.append(form(_BY_NAME["value_dim_larger"], group=8))
        cases.append(form(_BY_NAME["long_prefill"], group=16))
        cases.append(form(_BY_NAME["decode_batch"], group=2))
        cases.append(form(_BY_NAME["long_cache_chunk"], group=64))
        cases.append(form(_BY_NAME["odd_head_dim"], group=4))
        cases.append(form(_BY_NAME["twins_exact_ties"], group=16))
    return cases


def _terms() -> list[Case]:
    """Windows, soft caps, sinks and slopes, alone, together, and on quantised caches."""
    mixed, long_prefill = _BY_NAME["mixed_phases"], _BY_NAME["long_prefill"]
    everything: dict[str, Any] = {"window": 6, "softcap": 3.0}
    both = {"sinks": True, "slopes": True}
    cases = []
    for base in (mixed, long_prefill, _LONG):
        window = 6 if base is mixed else 40
        cases += [
            _with(base, "window", window=window),
            _with(base, "softcap", softcap=2.5),
            _with(base, "sinks", changes={"sinks": True}),
            _with(base, "slopes", changes={"slopes": True}),
        ]
    return [
        *cases,
        _with(mixed, "window_1", window=1),
        # A sink takes a share of a single token's probability too, so that its map is not what ties give.
        _with(_BY_NAME["fresh_s1"], "sinks", changes={"sinks": True}),
        _with(mixed, "everything", changes=both, **everything),
        _with(mixed, "everything_k8v4", changes=both, key_bits=8, value_bits=4, group=8, **everything),
        _with(_LONG, "everything_k8v8", changes=both, key_bits=8, value_bits=8, window=40, softcap=3.0),
    ]


CASES: tuple[Case, ...] = (
    *_EXACT,
    _PREFIX,
    Case("one_long_page", 4, 4, 2, ((0, 9), (17, 3)), page=40, capacity=40),
    Case("pages_of_one", 4, 2, 1, ((0, 9), (17, 3)), page=1),
    *_quantised(),
)
"""What every implementation passes."""

TERM_CASES: tuple[Case, ...] = tuple(_terms())
"""Windows, soft caps, sinks and slopes."""


def check(case: Case, inputs: Mapping[str, Tensor], result: AttentionResult, dtype: str = "float32") -> None:
    """Compare one implementation's result with the reference.

    ``inputs`` are the inputs as they were before the call. The head map must be identical, the output within
    the dtype's tolerance, the caches bit for bit: new rows, rows that were there, and bytes that the op has
    no business with (unused pages and slots, positions past the new rows) alike.

    Raises:
        AssertionError: naming the case, the output and the worst difference.
    """
    expected = case.reference(inputs)
    actual_map, wanted_map = np.asarray(result.present_head_map), expected.present_head_map
    assert np.array_equal(actual_map, wanted_map), (
        f"{case.name}: present_head_map is {actual_map.tolist()}, expected {wanted_map.tolist()}"
    )
    for name in CACHES:
        wanted = getattr(expected, name)
        if wanted is not None:
            check_bits(f"{case.name}: {name}", np.asarray(getattr(result, name)), wanted)
    exact = case.reference(widened(inputs))
    check_output(case.name, result.output, exact.output, inputs["lengths"], dtype)


def widened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float64 for what is of type T; scales, and caches in float16 or codes, are what they are."""
    return {
        name: value if name in CACHES and value.dtype == np.float16 else widen(value)
        for name, value in inputs.items()
    }
