"""The active rows of a call, checked: lengths against pages, tables against the pool, maps against slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chai_export.op import pages
from chai_export.op.attend import Int32Array, Tensor
from chai_export.op.attributes import Attributes
from chai_export.op.head_map import kept_kv_heads


@dataclass(frozen=True)
class Row:
    """One row with new tokens: ``past`` cached (n) and ``new`` ones (m).

    ``fresh`` rows decide their head map in this call from their first ``exact`` tokens, which are computed
    exactly; in other rows ``exact`` is 0. ``seen`` are the positions that any of the new tokens sees.
    """

    index: int
    past: int
    new: int
    fresh: bool
    exact: int
    seen: range


def check_rows(
    query: Tensor,
    key_cache: Tensor,
    page_table: Int32Array,
    past_head_map: Int32Array,
    past_lengths: NDArray[np.int32],
    lengths: NDArray[np.int32],
    attributes: Attributes,
) -> list[Row]:
    """The rows with new tokens.

    Raises:
        ValueError: lengths, pages or shapes of tables and maps do not fit each other.
    """
    batch, num_heads, tokens, _ = query.shape
    num_pages, _, page_size, _ = key_cache.shape
    if past_head_map.shape != (batch, num_heads):
        raise ValueError(f"past_head_map must be [{batch}, {num_heads}], got {list(past_head_map.shape)}")
    if page_table.ndim != 2 or len(page_table) != batch:
        raise ValueError(f"page_table must be [{batch}, M], got {list(page_table.shape)}")
    capacity = page_table.shape[1] * page_size
    rows = []
    for b in range(batch):
        past, new = int(past_lengths[b]), int(lengths[b])
        if not 0 <= new <= tokens:
            raise ValueError(f"row {b}: lengths is {new}, must be between 0 and {tokens}")
        if past < 0:
            raise ValueError(f"row {b}: past_lengths is {past}, must not be negative")
        if new > 0 and past + new > capacity:
            raise ValueError(f"row {b}: {past} cached and {new} new tokens exceed the capacity {capacity}")
        if new > 0:
            fresh = attributes.online and past == 0
            exact = min(attributes.probe_tokens, new) if fresh else 0
            rows.append(Row(b, past, new, fresh, exact, range(attributes.first_visible(past), past + new)))
    pages.check_tables(
        page_table,
        [row.index for row in rows],
        [row.seen for row in rows],
        [range(row.past, row.past + row.new) for row in rows],
        num_pages,
        page_size,
    )
    return rows


def check_map(row: int, head_map: Int32Array, group: int, kept: int) -> None:
    """Raise ValueError unless a map names existing heads, of at most ``kept`` KV heads."""
    num_heads = len(head_map)
    if head_map.min() < 0 or head_map.max() >= num_heads:
        raise ValueError(f"row {row}: head map entries must be between 0 and {num_heads - 1}")
    distinct = len(kept_kv_heads(head_map, group))
    if distinct > kept:
        raise ValueError(f"row {row}: the head map keeps {distinct} KV heads, the K cache has {kept} slots")
