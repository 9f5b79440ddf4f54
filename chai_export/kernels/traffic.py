"""Bytes that each kernel must move through device memory, and its arithmetic: the floor under its time.

Each input is counted as read once and each output as written once; what several programs of a launch read
again is expected in the L2 cache. e is the element size, T = n + m the visible tokens of a row,
t = min(P, m), q = H / G. Rows are counted as equal: multiply one row's figure by B.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from chai_export.kernels.formula import evaluate
from chai_export.kernels.program import Program
from chai_export.kernels.spec import Shape, Spec


@dataclass(frozen=True)
class Traffic:
    """Bytes read plus written, and multiply-adds counted as two operations."""

    bytes: int
    flops: int


def call_traffic(
    program: Program, shape: Shape, past: int, new: int, head_map: Sequence[int], online: bool = False
) -> dict[str, Traffic]:
    """Traffic per kernel of one call whose rows all have ``past`` cached and ``new`` new tokens.

    Args:
        program: launches with their block sizes.
        shape: B, S, R and C of the call.
        past: n of every row.
        new: m of every row.
        head_map: H entries, the same map in every row (decides prefill's pieces).
        online: whether the call clusters fresh rows (then the probe kernel runs).
    """
    spec = program.spec
    symbols = shape.symbols(spec) | {"online": int(online)}
    rows = {
        "probe_kernel": lambda: probe(spec, min(spec.probe_tokens, new)),
        "head_map_kernel": lambda: head_map_traffic(spec, shape, online and past == 0),
        "append_kernel": lambda: append(spec, shape, new),
        "decode_begin_kernel": lambda: append(spec, shape, new),
        "prefill_kernel": lambda: prefill(program, shape, past, new, head_map),
        "decode_scores_kernel": lambda: decode_scores(program, shape, past + new),
        "decode_values_kernel": lambda: decode_values(program, shape, past + new),
        "decode_merge_kernel": lambda: decode_merge(program, shape),
    }
    result = {}
    for launch in program.launches:
        if evaluate(launch.when, symbols):
            one = rows[launch.name]()
            result[launch.name] = Traffic(one.bytes * shape.batch, one.flops * shape.batch)
    return result


def probe(spec: Spec, probe_tokens: int) -> Traffic:
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


def append(spec: Spec, shape: Shape, new: int) -> Traffic:
    """bytes = 2 e m (R D + G Dv): new rows read and written."""
    return Traffic(2 * spec.item_bytes * new * spec.cache_elements(shape.kept), 0)


def prefill(program: Program, shape: Shape, past: int, new: int, head_map: Sequence[int]) -> Traffic:
    """bytes = e (m N D + T (R D + G Dv) + m H Dv); flops = 2 (m n + m (m + 1) / 2) (pieces D + H Dv).

    N is the number of representatives. Each piece computes its representative's scores once, and each query
    head multiplies them with its V; see :func:`count_pieces`.
    """
    spec, visible = program.spec, past + new
    representatives = len(set(head_map))
    launch = next(launch for launch in program.launches if launch.name == "prefill_kernel")
    pieces = count_pieces(head_map, launch.constants["MEMBERS"])
    moved = new * representatives * spec.head_dim + new * spec.num_query_heads * spec.value_head_dim
    moved += visible * spec.cache_elements(shape.kept)
    pairs = new * past + new * (new + 1) // 2
    flops = 2 * pairs * (pieces * spec.head_dim + spec.num_query_heads * spec.value_head_dim)
    return Traffic(spec.item_bytes * moved, flops)


def count_pieces(head_map: Sequence[int], members: int) -> int:
    """Pieces that prefill cuts a map into: full ones of ``members`` heads, and one per head left over."""
    return sum(size // members + size % members for size in Counter(head_map).values())


def decode_scores(program: Program, shape: Shape, visible: int) -> Traffic:
    """bytes = e (T R D + R q D) + R q (e T + 8 tiles): K once, weights and the tiles' statistics written.

    flops = 2 T R q D.
    """
    spec = program.spec
    rows = shape.kept * spec.group
    moved = spec.item_bytes * (visible * shape.kept * spec.head_dim + rows * spec.head_dim + rows * visible)
    return Traffic(moved + 8 * rows * _tiles(program, visible), 2 * visible * rows * spec.head_dim)


def decode_values(program: Program, shape: Shape, visible: int) -> Traffic:
    """bytes = e T (G Dv + N) + 8 N tiles + 4 H splits (Dv + 2): V once, weights once per representative.

    N is at most min(H, R q), which is what is counted. flops = 2 T H Dv.
    """
    spec = program.spec
    rows = min(spec.num_query_heads, shape.kept * spec.group)
    moved = spec.item_bytes * visible * (spec.num_kv_heads * spec.value_head_dim + rows)
    moved += 8 * rows * _tiles(program, visible) + _partial_bytes(program, shape)
    return Traffic(moved, 2 * visible * spec.num_query_heads * spec.value_head_dim)


def decode_merge(program: Program, shape: Shape) -> Traffic:
    """bytes = 4 H splits (Dv + 2) + e H Dv; flops = 2 H splits Dv."""
    spec = program.spec
    columns = spec.num_query_heads * spec.value_head_dim
    moved = _partial_bytes(program, shape) + spec.item_bytes * columns
    return Traffic(moved, 2 * columns * _splits(program, shape))


def cache_bytes(spec: Spec, kept: int, visible: int) -> int:
    """Bytes of cache that one decoded token reads in a row: e T (R D + G Dv). With R = G, all heads."""
    return spec.item_bytes * visible * spec.cache_elements(kept)


def _tiles(program: Program, visible: int) -> int:
    launch = next(launch for launch in program.launches if launch.name == "decode_scores_kernel")
    return -(-visible // launch.constants["BLOCK_N"])


def _splits(program: Program, shape: Shape) -> int:
    launch = next(launch for launch in program.launches if launch.name == "decode_values_kernel")
    return evaluate(launch.grid[0], shape.symbols(program.spec))


def _partial_bytes(program: Program, shape: Shape) -> int:
    spec = program.spec
    return 4 * spec.num_query_heads * _splits(program, shape) * (spec.value_head_dim + 2)
