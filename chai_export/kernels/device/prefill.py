"""Attention of S > 1 new tokens: scores of a representative once, applied to several V heads of its cluster.

Contract
    grid      (ceil(S / BLOCK_M), H, B): a block of queries of one piece of a row's plan (see
              kernels/device/head_map.py); rows have at most H pieces, programs without one return at once
    reads     query [B,H,S,D] of the representative, the stored rows that the block sees, by the page table
    writes    output [B,S,H*Dv] of the piece's query heads: all rows, zero at and past m, except rows 0 … P-1
              of fresh rows when exact = 1, which the probe kernel writes
    numerics  stored rows become T; products accumulate in float32 (IEEE for float32 tensors), softmax in
              float32 with base 2

With slopes the scores of a cluster's heads differ, so that pieces are single heads then.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton adds tuples but does not unpack them

import triton
import triton.language as tl

from chai_export.kernels.device.pages import first_visible, places
from chai_export.kernels.device.product import product
from chai_export.kernels.device.rows import row_lengths
from chai_export.kernels.device.storage import load_rows
from chai_export.kernels.device.terms import LOG2_E, LOWEST, capped


@triton.jit
def attend_range(
    query,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    table_ptr,
    slot,
    kv_heads,
    row_max,
    row_sum,
    sums,
    first,
    end,
    position,
    kept,
    pages,
    page_length,
    window,
    scale,
    softcap,
    slope,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MEMBERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add keys first … end-1 to the running softmax and to the sums of each member, [BLOCK_M, Dv] each.

    ``position`` int32 [BLOCK_M] is each query's place in the sequence. One loop masks every tile: a second
    one for tiles that all queries see whole would double what a compiler has to do.
    """
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        page, offset, inside = places(table_ptr, n, n < end, page_length, pages)
        key = load_rows(
            key_cache_ptr, key_scales_ptr, (page * kept + slot) * page_length + offset, inside, HEAD_DIM,
            HEAD_DIM_PADDED, KEY_BITS, GROUP,
        )  # fmt: skip
        no_scores = tl.zeros([query.shape[0], BLOCK_N], tl.float32)
        scores = product(query, tl.trans(key.to(query.dtype)), no_scores, INTERPRETED) * scale
        scores = capped(scores, softcap, SOFTCAP)
        distance = n[None, :] - position[:, None]
        if SLOPES:
            scores += slope * distance.to(tl.float32)
        scores *= LOG2_E
        visible = (distance <= 0) & (n < end)[None, :] & ((window == 0) | (distance > -window))
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        row_max = new_max
        weights = weights.to(query.dtype)
        added = ()
        for member in tl.static_range(MEMBERS):
            value = load_rows(
                value_cache_ptr, value_scales_ptr,
                (page * KV_HEADS + kv_heads[member]) * page_length + offset, inside, VALUE_DIM,
                VALUE_DIM_PADDED, VALUE_BITS, GROUP,
            )  # fmt: skip
            value = value.to(query.dtype)
            added = added + (product(weights, value, sums[member] * shrink[:, None], INTERPRETED),)
        sums = added
    return row_max, row_sum, sums


@triton.jit
def attend_piece(
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    table_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    present_head_map_ptr,
    plan_ptr,
    piece_ptr,
    output_ptr,
    row,
    first_query,
    past,
    new,
    tokens,
    kept,
    pages,
    page_length,
    window,
    exact,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PROBE: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
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

    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    kv_heads = ()
    sums = ()
    for member in tl.static_range(MEMBERS):
        kv_heads = kv_heads + (tl.load(piece_ptr + member) // group,)
        sums = sums + (tl.zeros([BLOCK_M, VALUE_DIM_PADDED], tl.float32),)
    slope = 0.0
    if SLOPES:
        slope = tl.load(alibi_slopes_ptr + tl.load(piece_ptr))
    first = first_visible(past + first_query, window)
    end = tl.where(first_query < new, past + tl.minimum(first_query + BLOCK_M, new), first)
    row_max, row_sum, sums = attend_range(
        query, key_cache_ptr, value_cache_ptr, key_scales_ptr, value_scales_ptr, table_ptr, slot, kv_heads,
        row_max, row_sum, sums, first, end, past + i, kept, pages, page_length, window, scale,
        softcap, slope, KV_HEADS, HEAD_DIM, VALUE_DIM, HEAD_DIM_PADDED, VALUE_DIM_PADDED, KEY_BITS,
        VALUE_BITS, GROUP, SOFTCAP, SLOPES, BLOCK_N, MEMBERS, INTERPRETED,
    )  # fmt: skip

    from_probe = (exact != 0) & (past == 0)
    first_written = tl.where(from_probe, tl.minimum(PROBE, new), 0)
    in_output = ((i >= first_written) & (i < tokens))[:, None] & (e < VALUE_DIM)[None, :]
    output_offsets = i.to(tl.int64)[:, None] * (HEADS * VALUE_DIM) + e[None, :]
    valid = i < new
    for member in tl.static_range(MEMBERS):
        head = tl.load(piece_ptr + member)
        total = row_sum
        if SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
            total += tl.exp2(sink - row_max)
        attended = sums[member] / tl.where(valid, total, 1.0)[:, None]
        attended = tl.where(valid[:, None], attended, 0.0)
        target = output_ptr + row * tokens * HEADS * VALUE_DIM + head * VALUE_DIM
        tl.store(target + output_offsets, attended.to(output_ptr.dtype.element_ty), mask=in_output)


@triton.jit(do_not_specialize=["tokens", "capacity", "kept", "pages", "page_length", "window", "exact"])
def prefill_kernel(
    query_ptr,
    page_table_ptr,
    past_lengths_ptr,
    lengths_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    present_head_map_ptr,
    plan_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    output_ptr,
    tokens,
    capacity,
    kept,
    pages,
    page_length,
    window,
    exact,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PROBE: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
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
    table_ptr = page_table_ptr + row * (capacity // page_length)
    plan_row = plan_ptr + row * (2 * KV_HEADS + 2 * HEADS + 1)
    order_ptr = plan_row + 2 * KV_HEADS + HEADS
    full = tl.load(order_ptr + HEADS)
    if piece < full:
        attend_piece(
            query_ptr, key_cache_ptr, value_cache_ptr, key_scales_ptr, value_scales_ptr, table_ptr, sinks_ptr,
            alibi_slopes_ptr, present_head_map_ptr, plan_row, order_ptr + piece * MEMBERS, output_ptr, row,
            first_query, past, new, tokens, kept, pages, page_length, window, exact, scale, softcap, HEADS,
            KV_HEADS, HEAD_DIM, VALUE_DIM, PROBE, HEAD_DIM_PADDED, VALUE_DIM_PADDED, KEY_BITS, VALUE_BITS,
            GROUP, SOFTCAP, SINKS, SLOPES, BLOCK_M, BLOCK_N, MEMBERS, INTERPRETED,
        )  # fmt: skip
    elif MEMBERS > 1:  # decided when compiling  # noqa: SIM102
        if piece < full + HEADS - full * MEMBERS:
            attend_piece(
                query_ptr, key_cache_ptr, value_cache_ptr, key_scales_ptr, value_scales_ptr, table_ptr,
                sinks_ptr, alibi_slopes_ptr, present_head_map_ptr, plan_row,
                order_ptr + full * (MEMBERS - 1) + piece, output_ptr, row, first_query, past, new, tokens,
                kept, pages, page_length, window, exact, scale, softcap, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM,
                PROBE, HEAD_DIM_PADDED, VALUE_DIM_PADDED, KEY_BITS, VALUE_BITS, GROUP, SOFTCAP, SINKS, SLOPES,
                BLOCK_M, BLOCK_N, 1, INTERPRETED,
            )  # fmt: skip
