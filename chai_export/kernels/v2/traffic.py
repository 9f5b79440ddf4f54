"""Bytes that each kernel of version 2 must move through device memory: the floor under its time.

Each input is counted as read once and each output as written once; what several programs of a launch read
again is expected in the L2 cache. T = n + m are the visible tokens of a row, at most the window before each
token. k and v are the bytes of a stored row of keys and of values with their scales, e the bytes of one
element of T. Rows are counted as equal: multiply one row's figure by B.
"""

from __future__ import annotations

from dataclasses import dataclass

from chai_export.kernels.formula import evaluate
from chai_export.kernels.program import Program
from chai_export.kernels.v2.spec import Shape, Spec

PAGE_ENTRY_BYTES = 4


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the caches that one row's tokens take: codes or elements, scales and minima, page table."""

    keys: int
    values: int
    scales: int
    page_table: int

    @property
    def together(self) -> int:
        """All of them."""
        return self.keys + self.values + self.scales + self.page_table


def cache_bytes(spec: Spec, shape: Shape, tokens: int) -> CacheBytes:
    """What ``tokens`` tokens of a row take: R heads of keys, G heads of values, entries of pages."""
    kept, kv_heads = shape.kept, spec.num_kv_heads
    key, value = spec.storage_k, spec.storage_v
    return CacheBytes(
        keys=tokens * kept * key.element_bytes(spec.item_bytes),
        values=tokens * kv_heads * value.element_bytes(spec.item_bytes),
        scales=tokens * (kept * key.scale_bytes + kv_heads * value.scale_bytes),
        page_table=-(-tokens // shape.page_length) * PAGE_ENTRY_BYTES,
    )


def append_bytes(spec: Spec, shape: Shape, new: int) -> int:
    """m (R (e D + k) + G (e Dv + v)): new rows read in T and stored."""
    read = spec.item_bytes * new * spec.cache_elements(shape.kept)
    stored = cache_bytes(spec, shape, new)
    return read + stored.keys + stored.values + stored.scales


def decode_bytes(program: Program, shape: Shape, past: int, window: int = 0) -> dict[str, int]:
    """Bytes per kernel of one decode step of a row with ``past`` tokens in its cache.

    Scores: T R k, the page table, the queries e R q D, the new keys, and 4 R q T written.
    Values: T G v, the page table, 4 N T with N = min(H, R q) representatives, the new values, partial results
    written and read, 8 H splits (Dv + 2), and the output e H Dv.
    """
    spec = program.spec
    assert isinstance(spec, Spec)
    seen = min(past + 1, window) if window else past + 1
    stored = cache_bytes(spec, shape, seen)
    key, value = spec.storage_k, spec.storage_v
    heads, item = spec.num_query_heads, spec.item_bytes
    score_rows = shape.kept * spec.group
    scores = stored.keys + seen * shape.kept * key.scale_bytes + stored.page_table
    scores += item * score_rows * spec.head_dim + 4 * score_rows * seen
    scores += shape.kept * (item * spec.head_dim + key.row_bytes(item))
    launch = next(launch for launch in program.launches if launch.name == "decode_values_kernel")
    splits = evaluate(launch.grid[0], shape.symbols(spec))
    values = stored.values + seen * spec.num_kv_heads * value.scale_bytes + stored.page_table
    values += 4 * min(heads, score_rows) * seen
    values += spec.num_kv_heads * (item * spec.value_head_dim + value.row_bytes(item))
    values += 8 * heads * splits * (spec.value_head_dim + 2) + item * heads * spec.value_head_dim
    return {"decode_scores_kernel": scores, "decode_values_kernel": values}


def prefill_bytes(spec: Spec, shape: Shape, past: int, new: int, representatives: int) -> int:
    """e (m N D + m H Dv) + T (R k + G v) and the page table: the caches once, queries and output once."""
    moved = new * (representatives * spec.head_dim + spec.num_query_heads * spec.value_head_dim)
    return spec.item_bytes * moved + cache_bytes(spec, shape, past + new).together
