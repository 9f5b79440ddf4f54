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

from chai_export.op import cases as version_1
from chai_export.op.cases import ROUNDING_MARGIN, check_output, widen
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.head_map import QUANTISATION_STEPS, cluster_heads, kept_kv_heads
from chai_export.op.v2 import pages
from chai_export.op.v2.attend import HeadTerms, Tensor, probe_probabilities
from chai_export.op.v2.attributes import Attributes
from chai_export.op.v2.reference import AttentionResult, clustered_head_attention
from chai_export.op.v2.storage import Storage

CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")
_SPARE_PAGES = 3
_NO_PAGE = -1


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
        return _make_inputs(self, ELEMENT_TYPES[dtype].numpy)

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


def _from_version_1(case: version_1.Case, page: int) -> Case:
    attributes = Attributes(case.scale, case.probe_tokens, case.online)
    shape = (case.heads, case.kv_heads, case.kept, case.rows, case.head_dim, case.value_dim, case.tokens)
    return Case(case.name, *shape, page, case.capacity, case.twins, attributes=attributes)


def _with(case: Case, suffix: str, *, changes: Mapping[str, Any] | None = None, **attributes: Any) -> Case:
    changed = replace(case.attributes, **attributes)
    return replace(case, name=f"{case.name}_{suffix}", attributes=changed, **(changes or {}))


_PAGE_SIZES = (8, 1, 5, 24)
_EXACT = tuple(
    _from_version_1(case, _PAGE_SIZES[index % len(_PAGE_SIZES)] if case.capacity < 100 else 32)
    for index, case in enumerate(version_1.CASES)
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
            _check_bits(f"{case.name}: {name}", np.asarray(getattr(result, name)), wanted)
    exact = case.reference(widened(inputs))
    check_output(case.name, result.output, exact.output, inputs["lengths"], dtype)


def _check_bits(what: str, actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == wanted.dtype, f"{what} is {actual.dtype}, expected {wanted.dtype}"
    assert actual.shape == wanted.shape, f"{what} is {actual.shape}, expected {wanted.shape}"
    unsigned = np.dtype(f"u{wanted.dtype.itemsize}")
    different = np.ascontiguousarray(actual).view(unsigned) != np.ascontiguousarray(wanted).view(unsigned)
    assert not different.any(), (
        f"{what} differs in {int(different.sum())} elements, first at {np.argwhere(different)[0].tolist()}"
    )


def widened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float64 for what is of type T; scales, and caches in float16 or codes, are what they are."""
    return {
        name: value if name in CACHES and value.dtype == np.float16 else widen(value)
        for name, value in inputs.items()
    }


def _make_inputs(case: Case, dtype: np.dtype[Any]) -> dict[str, Tensor]:
    rng = np.random.default_rng([ord(letter) for letter in case.name])
    batch, tokens = len(case.rows), case.tokens or max(new for _, new in case.rows)
    value_dim = case.value_dim or case.head_dim
    group = case.heads // case.kv_heads

    def draw(*shape: int) -> Tensor:
        return rng.standard_normal(shape).astype(dtype)

    query = draw(batch, case.heads, tokens, case.head_dim)
    key = draw(batch, case.kv_heads, tokens, case.head_dim)
    value = draw(batch, case.kv_heads, tokens, value_dim)
    if case.twins:
        key = np.ascontiguousarray(key[:, np.arange(case.kv_heads) % case.twins])
        query = np.ascontiguousarray(query[:, case.patterns()])
    terms = HeadTerms(
        rng.standard_normal(case.heads).astype(dtype) if case.sinks else None,
        (2.0 ** -rng.uniform(1, 6, case.heads)).astype(np.float32) if case.slopes else None,
    )
    past_head_map = np.stack([_random_map(rng, case) for _ in range(batch)])
    for row, other, _ in case.prefix:
        past_head_map[row] = past_head_map[other]  # keys lie in the slots of one map
    table, num_pages = _page_table(rng, case)
    pools = {
        **_pool(rng, "key", case.storage_k, num_pages, case.kept, case.page, dtype),
        **_pool(rng, "value", case.storage_v, num_pages, case.kv_heads, case.page, dtype),
    }
    for b, (past, new) in enumerate(case.rows):
        used = case.kept
        if case.is_fresh(b):
            keep_rounding_margin(rng, case, query[b], key[b], terms, min(case.attributes.probe_tokens, new))
            past_head_map[b] = -7  # not to be read
        else:
            used = len(kept_kv_heads(past_head_map[b], group))
        first = case.attributes.first_visible(past)
        shared = max((count * case.page for row, _, count in case.prefix if row == b), default=0)
        start = min(max(first, shared), past) if new else past  # nothing of an inactive row is there to read
        # Written through the table as an earlier call would have: what a window has left behind stays poison.
        for name, storage, heads in (("key", case.storage_k, used), ("value", case.storage_v, case.kv_heads)):
            stored, scales = storage.store(draw(heads, past - start, storage.width))
            pages.write(pools[f"{name}_cache"][:, :heads], table[b], start, stored, slice(None))
            if scales is not None:
                pages.write(pools[f"{name}_scales"][:, :heads], table[b], start, scales, slice(None))
        for new_rows in (query, key, value):
            new_rows[b, :, new:] = np.nan
    for b, (past, new) in enumerate(case.rows):
        _forget(rng, table[b], case, past, new)
    named = {"sinks": terms.sinks, "alibi_slopes": terms.slopes}
    return {
        "query": query,
        "key": key,
        "value": value,
        **pools,
        "page_table": table,
        "past_head_map": past_head_map,
        "past_lengths": np.array([past for past, _ in case.rows], dtype=np.int32),
        "lengths": np.array([new for _, new in case.rows], dtype=np.int32),
        **{name: term for name, term in named.items() if term is not None},
    }


def _page_table(rng: np.random.Generator, case: Case) -> tuple[NDArray[np.int32], int]:
    """A page of its own for every position of every row, in random order, and the size of the pool."""
    per_row = -(-case.capacity // case.page)
    count = per_row * len(case.rows) + _SPARE_PAGES
    table = rng.permutation(count)[: per_row * len(case.rows)].reshape(len(case.rows), per_row)
    for row, other, shared in case.prefix:
        table[row, :shared] = table[other, :shared]
    return table.astype(np.int32), count


def _forget(rng: np.random.Generator, table: NDArray[np.int32], case: Case, past: int, new: int) -> None:
    """Take the pages out of a row's table that the call has no business with."""
    seen = pages.spanned(case.attributes.first_visible(past), past + new, case.page) if new else range(0)
    for index in range(len(table)):
        if index not in seen:
            table[index] = rng.choice([_NO_PAGE, 1 << 20])


def _pool(
    rng: np.random.Generator,
    name: str,
    storage: Storage,
    num_pages: int,
    heads: int,
    page: int,
    dtype: np.dtype[Any],
) -> dict[str, Tensor]:
    """Poison: NaN, random codes with scales of NaN."""
    shape = (num_pages, heads, page)
    stored = storage.dtype(dtype)
    if not storage.quantised:
        return {f"{name}_cache": np.full((*shape, storage.columns), np.nan, stored)}
    codes = rng.integers(0, 256, (*shape, storage.columns), dtype=np.uint8).view(stored)
    return {
        f"{name}_cache": codes,
        f"{name}_scales": np.full((*shape, storage.scale_columns), np.nan, np.float16),
    }


def _random_map(rng: np.random.Generator, case: Case) -> NDArray[np.int32]:
    """A valid map of random distances; half of the time one slot stays unused."""
    points = rng.integers(0, 1000, size=case.heads)
    distance = np.abs(points[:, None] - points[None, :]).astype(np.int64)
    used = case.kept - int(case.kept > 1 and rng.random() < 0.5)
    return cluster_heads(distance, case.kv_heads, used)


def keep_rounding_margin(
    rng: np.random.Generator, case: Case, query: Tensor, key: Tensor, terms: HeadTerms, probe: int
) -> None:
    """Redraw single probe queries, in place, until no probability is near a rounding boundary."""
    pattern = case.patterns()
    while True:
        p = probe_probabilities(query[:, :probe], key[:, :probe], case.attributes, terms)
        steps = p * QUANTISATION_STEPS
        to_boundary = np.abs(steps - np.floor(steps) - 0.5)
        unsafe = np.argwhere((to_boundary < ROUNDING_MARGIN).any(axis=2))
        if not len(unsafe):
            return
        for head, token in unsafe:
            twins = np.flatnonzero(pattern == pattern[head])
            query[twins, token] = rng.standard_normal(case.head_dim).astype(query.dtype)
