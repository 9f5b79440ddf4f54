"""The second launch of a decode step (S = 1): attention with the scores of :mod:`.decode_scores`.

The new value row is stored, then V of each KV head read once for all its query heads, whatever clusters they
are in, with the scores of their representatives; one partial result per split. The split that arrives last
joins them.

A fresh row's only token attends to itself, exactly: its own query, key and value as the call brings them.

Contract
    grid      (splits, G * blocks, B); runs when S = 1
    reads     scores, present_head_map, value [B,G,1,Dv], the stored values that the token sees
    workspace partial float32 [B, H, splits, Dv], partial_max and partial_sum float32 [B, H, splits]
              counters int32 [B, G * blocks]
    writes    the new rows of the values' pool; output [B,1,H*Dv], zero for inactive rows
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from chai_export.kernels.device.decode_scores import split_range, store_new_row
from chai_export.kernels.device.pages import places
from chai_export.kernels.device.product import product
from chai_export.kernels.device.rows import kept_slots, row_lengths, stored_map
from chai_export.kernels.device.storage import load_rows
from chai_export.kernels.device.terms import LOG2_E, LOWEST, capped


@triton.jit
def merge_splits(
    partial_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    sinks_ptr,
    output_ptr,
    row,
    head,
    used,
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """The partial results of one query head into its output.

    Other programs wrote them, so they are not read through the L1 cache.
    """
    e = tl.arange(0, VALUE_DIM_PADDED)
    first = (row * HEADS + head) * splits
    row_max = tl.full([], LOWEST, tl.float32)
    row_sum = tl.zeros([], tl.float32)
    total = tl.zeros([VALUE_DIM_PADDED], tl.float32)
    for start in range(0, used, BLOCK_SPLITS):
        s = start + tl.arange(0, BLOCK_SPLITS)
        in_use = s < used
        split_max = tl.load(partial_max_ptr + first + s, mask=in_use, other=LOWEST, cache_modifier=".cg")
        split_sum = tl.load(partial_sum_ptr + first + s, mask=in_use, other=0.0, cache_modifier=".cg")
        in_partial = in_use[:, None] & (e < VALUE_DIM)[None, :]
        source = partial_ptr + (first + s)[:, None] * VALUE_DIM + e[None, :]
        partial = tl.load(source, mask=in_partial, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(split_max, axis=0))
        shrink = tl.exp2(row_max - new_max)
        split_scale = tl.where(in_use, tl.exp2(split_max - new_max), 0.0)
        row_sum = row_sum * shrink + tl.sum(split_sum * split_scale, axis=0)
        total = total * shrink + tl.sum(partial * split_scale[:, None], axis=0)
        row_max = new_max
    if SINKS:
        row_sum += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E - row_max)
    target = output_ptr + (row * HEADS + head) * VALUE_DIM + e
    tl.store(target, (total / row_sum).to(output_ptr.dtype.element_ty), mask=e < VALUE_DIM)


@triton.jit
def attend_to_itself(
    query_ptr,
    key_ptr,
    value_ptr,
    sinks_ptr,
    output_ptr,
    row,
    kv_head,
    j,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Output of the query heads ``j`` of a KV head of a row whose only token is this call's."""
    group: tl.constexpr = HEADS // KV_HEADS
    e = tl.arange(0, VALUE_DIM_PADDED)
    value = tl.load(value_ptr + (row * KV_HEADS + kv_head) * VALUE_DIM + e, mask=e < VALUE_DIM, other=0.0)
    share = tl.full([j.shape[0]], 1.0, tl.float32)
    if SINKS:
        d = tl.arange(0, HEAD_DIM_PADDED)
        key = tl.load(key_ptr + (row * KV_HEADS + kv_head) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        query_row = query_ptr + (row * HEADS + kv_head * group + j)[:, None] * HEAD_DIM
        query = tl.load(
            query_row + d[None, :], mask=(j < group)[:, None] & (d < HEAD_DIM)[None, :], other=0.0
        )
        score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
        sink = tl.load(sinks_ptr + kv_head * group + j, mask=j < group, other=0.0).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp(sink - capped(score, softcap, SOFTCAP)))
    attended = share[:, None] * value.to(tl.float32)[None, :]
    target = output_ptr + (row * HEADS + kv_head * group + j)[:, None] * VALUE_DIM + e[None, :]
    in_output = (j < group)[:, None] & (e < VALUE_DIM)[None, :]
    tl.store(target, attended.to(output_ptr.dtype.element_ty), mask=in_output)


@triton.jit
def attend_split(
    value_cache_ptr,
    value_scales_ptr,
    table_ptr,
    alibi_slopes_ptr,
    present_head_map_ptr,
    scores_ptr,
    partial_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    row,
    kv_head,
    j,
    split,
    splits,
    first,
    begin,
    end,
    visible,
    capacity,
    kept,
    pages,
    page_length,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOPES: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Partial results of the query heads ``j`` over one split's tokens."""
    group: tl.constexpr = HEADS // KV_HEADS
    e = tl.arange(0, VALUE_DIM_PADDED)
    in_group = j < group
    _, head_map = stored_map(present_head_map_ptr + row * HEADS, HEADS, HEADS_PADDED)
    slots = kept_slots(head_map, kept, HEADS, KV_HEADS, KV_PADDED)
    entry = tl.load(present_head_map_ptr + row * HEADS + kv_head * group + j, mask=in_group, other=0)
    representative = tl.minimum(tl.maximum(entry, 0), HEADS - 1)
    of_head = (representative // group)[:, None] == tl.arange(0, KV_PADDED)[None, :]
    slot = tl.max(tl.where(of_head, slots[None, :], 0), axis=1)
    score_row = (row * kept + slot) * group + representative % group
    columns = tl.cdiv(capacity, BLOCK_N) * BLOCK_N
    row_max = tl.full([GROUP_BLOCK], LOWEST, tl.float32)
    row_sum = tl.zeros([GROUP_BLOCK], tl.float32)
    total = tl.zeros([GROUP_BLOCK, VALUE_DIM_PADDED], tl.float32)
    if SLOPES:
        slope = tl.load(alibi_slopes_ptr + kv_head * group + j, mask=in_group, other=0.0) * LOG2_E
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = (n >= first) & (n < visible)
        page, offset, inside = places(table_ptr, n, seen, page_length, pages)
        value = load_rows(
            value_cache_ptr, value_scales_ptr, (page * KV_HEADS + kv_head) * page_length + offset, inside,
            VALUE_DIM, VALUE_DIM_PADDED, VALUE_BITS, GROUP,
        ).to(DTYPE)  # fmt: skip
        source = scores_ptr + score_row[:, None] * columns + n[None, :]
        scores = tl.load(source, mask=in_group[:, None] & seen[None, :], other=0.0)
        if SLOPES:
            scores += slope[:, None] * (n - (visible - 1)).to(tl.float32)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        shrink = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        row_max = new_max
        total = product(weights.to(DTYPE), value, total * shrink[:, None], INTERPRETED)
    partial = ((row * HEADS + kv_head * group + j) * splits) + split
    tl.store(partial_max_ptr + partial, row_max, mask=in_group)
    tl.store(partial_sum_ptr + partial, row_sum, mask=in_group)
    target = partial_ptr + partial[:, None] * VALUE_DIM + e[None, :]
    tl.store(target, total, mask=in_group[:, None] & (e < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["capacity", "kept", "pages", "page_length", "window", "online"])
def decode_values_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    page_table_ptr,
    past_lengths_ptr,
    lengths_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    present_head_map_ptr,
    value_cache_ptr,
    value_scales_ptr,
    scores_ptr,
    partial_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    counters_ptr,
    output_ptr,
    capacity,
    kept,
    pages,
    page_length,
    window,
    online,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of GROUP_BLOCK query heads of one KV head. Grid (splits, G * blocks, B)."""
    group: tl.constexpr = HEADS // KV_HEADS
    blocks: tl.constexpr = (group + GROUP_BLOCK - 1) // GROUP_BLOCK
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    kv_head = tl.program_id(1) // blocks
    row = tl.program_id(2).to(tl.int64)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, 1, capacity)
    visible = past + new
    first_head = tl.program_id(1) % blocks * GROUP_BLOCK
    j = first_head + tl.arange(0, GROUP_BLOCK)
    first, begin, end, used = split_range(visible, window, split, splits, BLOCK_N)
    if new == 0:
        if split == 0:
            e = tl.arange(0, VALUE_DIM_PADDED)
            target = output_ptr + (row * HEADS + kv_head * group + j)[:, None] * VALUE_DIM + e[None, :]
            nothing = tl.zeros([GROUP_BLOCK, VALUE_DIM_PADDED], output_ptr.dtype.element_ty)
            tl.store(target, nothing, mask=(j < group)[:, None] & (e < VALUE_DIM)[None, :])
    elif begin < end:
        table_ptr = page_table_ptr + row * (capacity // page_length)
        if past < end:
            store_new_row(
                value_ptr, value_cache_ptr, value_scales_ptr, table_ptr, row * KV_HEADS + kv_head, kv_head,
                KV_HEADS, past, pages, page_length, VALUE_DIM, VALUE_DIM_PADDED, VALUE_BITS, GROUP,
            )  # fmt: skip
        if (online != 0) & (past == 0):
            attend_to_itself(
                query_ptr, key_ptr, value_ptr, sinks_ptr, output_ptr, row, kv_head, j, scale, softcap, HEADS,
                KV_HEADS, HEAD_DIM, VALUE_DIM, HEAD_DIM_PADDED, VALUE_DIM_PADDED, SOFTCAP, SINKS,
            )  # fmt: skip
        else:
            attend_split(
                value_cache_ptr, value_scales_ptr, table_ptr, alibi_slopes_ptr, present_head_map_ptr,
                scores_ptr, partial_ptr, partial_max_ptr, partial_sum_ptr, row, kv_head, j, split, splits,
                first, begin, end, visible, capacity, kept, pages, page_length, HEADS, KV_HEADS, VALUE_DIM,
                HEADS_PADDED, KV_PADDED, VALUE_DIM_PADDED, VALUE_BITS, GROUP, SLOPES, GROUP_BLOCK, BLOCK_N,
                value_ptr.dtype.element_ty, INTERPRETED,
            )  # fmt: skip
            # All threads have stored before one of them counts; release and acquire order the programs.
            tl.debug_barrier()
            counter = counters_ptr + row * (KV_HEADS * blocks) + tl.program_id(1)
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == used - 1:
                for head in range(first_head, tl.minimum(first_head + GROUP_BLOCK, group)):
                    merge_splits(
                        partial_ptr, partial_max_ptr, partial_sum_ptr, sinks_ptr, output_ptr, row,
                        kv_head * group + head, used, splits, HEADS, VALUE_DIM, VALUE_DIM_PADDED, SINKS,
                        BLOCK_SPLITS,
                    )  # fmt: skip
