"""Bytes that each kernel must move through device memory, and its arithmetic: the floor under its time.

Each input is counted as read once and each output as written once; what several programs of a launch read
again is expected in the L2 cache. T = n + m are the visible tokens of a row, at most the window before each
token. k and v are the bytes of a stored row of keys and of values with their scales, e the bytes of one
element of T. Rows are counted as equal: multiply one row's figure by B.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from chai_export.kernels.formula import evaluate
from chai_export.kernels.program import Program
from chai_export.kernels.spec import Shape, Spec

PAGE_ENTRY_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes read plus written, and multiply-adds counted as two operations."""

    bytes: int
    flops: int


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


def call_traffic(
    program: Program, shape: Shape, past: int, new: int, head_map: Sequence[int], online: bool = False
) -> dict[str, Traffic]:
    """Traffic per kernel of one call whose rows all have ``past`` cached and ``new`` new tokens, no window.

    Args:
        program: launches with their block sizes.
        shape: B, S, R and C of the call.
        past: n of every row.
        new: m of every row.
        head_map: H entries, the same map in every row (decides prefill's pieces).
        online: whether the call clusters fresh rows (then the probe kernel runs).
    """
    spec, visible = program.spec, past + new
    scores_flops = 2 * visible * shape.kept * spec.group * spec.head_dim
    values_flops = 2 * visible * spec.num_query_heads * spec.value_head_dim
    clustered = online and past == 0
    decode = decode_bytes(program, shape, past) if shape.tokens == 1 else {}
    rows = {
        "probe_kernel": lambda: probe_traffic(spec, min(spec.probe_tokens, new)),
        "head_map_kernel": lambda: head_map_traffic(spec, shape, clustered),
        "append_kernel": lambda: Traffic(append_bytes(spec, shape, new), 0),
        "prefill_kernel": lambda: prefill_traffic(program, shape, past, new, head_map),
        "decode_scores_kernel": lambda: Traffic(decode["decode_scores_kernel"], scores_flops),
        "decode_values_kernel": lambda: Traffic(decode["decode_values_kernel"], values_flops),
    }
    symbols = shape.symbols(spec) | {"online": int(online), "window": 0}
    result = {}
    for launch in program.launches:
        if evaluate(launch.when, symbols):
            one = rows[launch.name]()
            result[launch.name] = Traffic(one.bytes * shape.batch, one.flops * shape.batch)
    return result


def probe_traffic(spec: Spec, probe_tokens: int) -> Traffic:
    """bytes = e t ((H + G) D + (H + G) Dv) + 4 P^2 H; flops = 2 H t^2 (D + Dv)."""
    t, both = probe_tokens, spec.num_query_heads + spec.num_kv_heads
    moved = spec.item_bytes * t * both * (spec.head_dim + spec.value_head_dim)
    moved += 4 * spec.probe_tokens**2 * spec.num_query_heads
    return Traffic(moved, 2 * spec.num_query_heads * t * t * (spec.head_dim + spec.value_head_dim))


def head_map_traffic(spec: Spec, shape: Shape, fresh: bool) -> Traffic:
    """bytes = 4 (P^2 H if fresh and R < G) + 4 (2 H + plan); operations = 3 H^2 P^2 integer ones if so."""
    heads, clustered = spec.num_query_heads, fresh and shape.kept < spec.num_kv_heads
    entries = spec.probe_tokens**2 * heads if clustered else 0
    plan = 2 * spec.num_kv_heads + 2 * heads + 1
    return Traffic(4 * (entries + 2 * heads + plan), 3 * heads * entries)


def prefill_traffic(program: Program, shape: Shape, past: int, new: int, head_map: Sequence[int]) -> Traffic:
    """flops = 2 (m n + m (m + 1) / 2) (pieces D + H Dv); bytes as :func:`prefill_bytes`.

    Each piece computes its representative's scores once, and each query head multiplies them with its V; see
    :func:`count_pieces`.
    """
    spec = program.spec
    launch = next(launch for launch in program.launches if launch.name == "prefill_kernel")
    pieces = count_pieces(head_map, launch.constants["MEMBERS"])
    pairs = new * past + new * (new + 1) // 2
    flops = 2 * pairs * (pieces * spec.head_dim + spec.num_query_heads * spec.value_head_dim)
    return Traffic(prefill_bytes(spec, shape, past, new, len(set(head_map))), flops)


def count_pieces(head_map: Sequence[int], members: int) -> int:
    """Pieces that prefill cuts a map into: full ones of ``members`` heads, and one per head left over."""
    return sum(size // members + size % members for size in Counter(head_map).values())
