"""Attention of S > 1 new tokens: scores of a representative once, applied to several V heads of its cluster.

Contract
    grid      (ceil(S / BLOCK_M), H, B): a block of queries of one piece of a row's plan (see head_map.py);
              rows have at most H pieces, programs without one return at once
    reads     query [B,H,S,D] of the representative, present_key, present_value rows 0 … n+m-1
    writes    output [B,S,H*Dv] of the piece's query heads: all rows, zero at and past m, except rows 0 … P-1
              of fresh rows when exact = 1, which the probe kernel writes
    numerics  products accumulate in float32 (IEEE for float32 tensors), softmax in float32 with base 2
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton adds tuples but does not unpack them

import triton
import triton.language as tl

from chai_export.kernels.device.product import product
from chai_export.kernels.device.rows import row_lengths

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_range(
    query,
    key_ptr,
    value_ptrs,
    row_max,
    row_sum,
    sums,
    first,
    end,
    position,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MEMBERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add keys first … end-1 to the running softmax and to the sums of each member, [BLOCK_M, Dv] each.

    ``position`` int32 [BLOCK_M] is each query's place in the sequence; without MASKED every key is visible.
    """
    d = tl.arange(0, HEAD_DIM_PADDED)
    e = tl.arange(0, VALUE_DIM_PADDED)
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_offsets = n[None, :] * HEAD_DIM + d[:, None]
        value_offsets = n[:, None] * VALUE_DIM + e[None, :]
        in_key = tl.broadcast_to((d < HEAD_DIM)[:, None], [HEAD_DIM_PADDED, BLOCK_N])
        in_value = tl.broadcast_to((e < VALUE_DIM)[None, :], [BLOCK_N, VALUE_DIM_PADDED])
        if MASKED:
            in_key &= (n < end)[None, :]
            in_value &= (n < end)[:, None]
        key = tl.load(key_ptr + key_offsets, mask=in_key, other=0.0)
        no_scores = tl.zeros([query.shape[0], BLOCK_N], tl.float32)
        scores = product(query, key, no_scores, INTERPRETED) * scale
        if MASKED:
            visible = (n[None, :] <= position[:, None]) & (n < end)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        row_max = new_max
        weights = weights.to(query.dtype)
        added = ()
        for member in tl.static_range(MEMBERS):
            value = tl.load(value_ptrs[member] + value_offsets, mask=in_value, other=0.0)
            added = added + (product(weights, value, sums[member] * shrink[:, None], INTERPRETED),)
        sums = added
    return row_max, row_sum, sums


@triton.jit
def attend_piece(
    query_ptr,
    present_key_ptr,
    present_value_ptr,
    present_head_map_ptr,
    plan_ptr,
    piece_ptr,
    output_ptr,
    row,
    first_query,
    past,
    new,
    tokens,
    capacity,
    kept,
    exact,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PROBE: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MEMBERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The block of queries from ``first_query`` for the MEMBERS query heads listed at ``piece_ptr``."""
    group: tl.constexpr = HEADS // KV_HEADS
    i = first_query + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM_PADDED)
    e = tl.arange(0, VALUE_DIM_PADDED)
    entry = tl.load(present_head_map_ptr + row * HEADS + tl.load(piece_ptr))
    representative = tl.minimum(tl.maximum(entry, 0), HEADS - 1)
    slot = tl.maximum(tl.load(plan_ptr + representative // group), 0)

    query_offsets = i[:, None] * HEAD_DIM + d[None, :]
    in_query = (i < new)[:, None] & (d < HEAD_DIM)[None, :]
    query_row = query_ptr + (row * HEADS + representative) * tokens * HEAD_DIM
    query = tl.load(query_row + query_offsets, mask=in_query, other=0.0)
    key_ptr = present_key_ptr + (row * kept + slot) * capacity * HEAD_DIM
    value_ptr = present_value_ptr + row * KV_HEADS * capacity * VALUE_DIM

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    value_ptrs = ()
    sums = ()
    for member in tl.static_range(MEMBERS):
        kv_head = (tl.load(piece_ptr + member) // group).to(tl.int64)
        value_ptrs = value_ptrs + (value_ptr + kv_head * capacity * VALUE_DIM,)
        sums = sums + (tl.zeros([BLOCK_M, VALUE_DIM_PADDED], tl.float32),)
    end = past + tl.minimum(first_query + BLOCK_M, new)
    seen_by_all = tl.where(first_query < new, (past + first_query + 1) // BLOCK_N * BLOCK_N, 0)
    end = tl.where(first_query < new, end, 0)
    row_max, row_sum, sums = attend_range(
        query, key_ptr, value_ptrs, row_max, row_sum, sums, 0, seen_by_all, past + i, scale * LOG2_E,
        HEAD_DIM, VALUE_DIM, HEAD_DIM_PADDED, VALUE_DIM_PADDED, BLOCK_N, MEMBERS, INTERPRETED, False,
    )  # fmt: skip
    row_max, row_sum, sums = attend_range(
        query, key_ptr, value_ptrs, row_max, row_sum, sums, seen_by_all, end, past + i, scale * LOG2_E,
        HEAD_DIM, VALUE_DIM, HEAD_DIM_PADDED, VALUE_DIM_PADDED, BLOCK_N, MEMBERS, INTERPRETED, True,
    )  # fmt: skip

    from_probe = (exact != 0) & (past == 0)
    first_written = tl.where(from_probe, tl.minimum(PROBE, new), 0)
    in_output = ((i >= first_written) & (i < tokens))[:, None] & (e < VALUE_DIM)[None, :]
    output_offsets = i.to(tl.int64)[:, None] * (HEADS * VALUE_DIM) + e[None, :]
    valid = (i < new)[:, None]
    for member in tl.static_range(MEMBERS):
        attended = tl.where(valid, sums[member] / row_sum[:, None], 0.0)
        target = output_ptr + row * tokens * HEADS * VALUE_DIM + tl.load(piece_ptr + member) * VALUE_DIM
        tl.store(target + output_offsets, attended.to(output_ptr.dtype.element_ty), mask=in_output)


@triton.jit(do_not_specialize=["tokens", "capacity", "kept", "exact"])
def prefill_kernel(
    query_ptr,
    past_lengths_ptr,
    lengths_ptr,
    present_head_map_ptr,
    plan_ptr,
    present_key_ptr,
    present_value_ptr,
    output_ptr,
    tokens,
    capacity,
    kept,
    exact,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PROBE: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MEMBERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of queries of one piece; late blocks, which see most keys, start first."""
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    piece = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, tokens, capacity)
    plan_row = plan_ptr + row * (2 * KV_HEADS + 2 * HEADS + 1)
    order_ptr = plan_row + 2 * KV_HEADS + HEADS
    full = tl.load(order_ptr + HEADS)
    if piece < full:
        attend_piece(
            query_ptr, present_key_ptr, present_value_ptr, present_head_map_ptr, plan_row,
            order_ptr + piece * MEMBERS, output_ptr, row, first_query, past, new, tokens, capacity, kept,
            exact, scale, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM, PROBE, HEAD_DIM_PADDED, VALUE_DIM_PADDED,
            BLOCK_M, BLOCK_N, MEMBERS, INTERPRETED,
        )  # fmt: skip
    elif MEMBERS > 1:  # decided when compiling  # noqa: SIM102
        if piece < full + HEADS - full * MEMBERS:
            attend_piece(
                query_ptr, present_key_ptr, present_value_ptr, present_head_map_ptr, plan_row,
                order_ptr + full * (MEMBERS - 1) + piece, output_ptr, row, first_query, past, new, tokens,
                capacity, kept, exact, scale, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM, PROBE, HEAD_DIM_PADDED,
                VALUE_DIM_PADDED, BLOCK_M, BLOCK_N, 1, INTERPRETED,
            )  # fmt: skip
