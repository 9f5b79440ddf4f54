"""The inputs of a case: random values where the op must read, poison wherever it must not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.op import pages
from chai_export.op.attend import HeadTerms, Tensor, probe_probabilities
from chai_export.op.head_map import QUANTISATION_STEPS, cluster_heads, kept_kv_heads
from chai_export.op.storage import Storage

if TYPE_CHECKING:
    from chai_export.op.cases import Case

_SPARE_PAGES = 3
_NO_PAGE = -1

ROUNDING_MARGIN = 1e-3
"""Probe probabilities keep this distance (in quantisation steps) from where rounding flips, so that float32
sums in another order cannot change a head map."""


def make_inputs(case: Case, dtype: np.dtype[Any]) -> dict[str, Tensor]:
    """The inputs that a case has, by name, from a seed of its name; see :mod:`chai_export.op.cases`."""
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
