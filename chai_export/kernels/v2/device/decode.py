"""Attention of one new token per row (S = 1) in two launches, so that each stored byte is read once.

1. ``decode_scores_kernel``  the new key row stored, then K of each kept head read once: scores of all its
                             query heads. It also passes the head map on and clears the counters of pass 2.
2. ``decode_values_kernel``  the new value row stored, then V of each KV head read once for all its query
                             heads, whatever clusters they are in, with the scores of their representatives;
                             one partial result per split. The split that arrives last joins them.

Both are split over the tokens that the row sees. The number of splits comes from shapes, their bounds from
the lengths on the device. A program whose tokens include the new one stores it itself and reads it after a
barrier: what is read is what is stored, and no launch is needed for it. Programs that share a split store the
same bytes. The counters are cleared in the launch before the one that counts, so that a call depends on no
earlier one, in CUDA graphs neither. One pass cannot do both: a query head may need the scores of any slot.

A fresh row's only token attends to itself, exactly: its own query, key and value as the call brings them.

Contract
    reads     query [B,H,1,D], key, value, past_head_map, the stored rows that the token sees
    workspace scores float32 [B, R*q, tiles * BLOCK_N] in base 2, scaled and capped, tiles = ceil(C / BLOCK_N)
              partial float32 [B, H, splits, Dv], partial_max and partial_sum float32 [B, H, splits]
              counters int32 [B, G * blocks]; quantised int32 [B, H] for fresh rows with sinks
    writes    the new rows of the pools; present_head_map [B,H]; output [B,1,H*Dv], zero for inactive rows
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from chai_export.kernels.device.decode import LOG2_E, LOWEST
from chai_export.kernels.device.head_map import clustered_map, group_distances
from chai_export.kernels.device.probe import QUANTISATION_STEPS, ROUNDING_MAGIC
from chai_export.kernels.device.product import product
from chai_export.kernels.device.rows import first_heads_map, kept_slots, row_lengths, stored_map
from chai_export.kernels.v2.device.pages import first_visible, places
from chai_export.kernels.v2.device.storage import load_rows, store_rows
from chai_export.kernels.v2.device.terms import capped

CHUNK = tl.constexpr(16)


@triton.jit
def split_range(visible, window, split, splits, BLOCK_N: tl.constexpr):
    """A split's part, in whole tiles, of what the last of ``visible`` tokens sees.

    Returns the first token seen, the part's first and end token (tile bounds), and the splits in use.
    """
    first = first_visible(visible - 1, window)
    first_tile = first // BLOCK_N
    tiles = tl.cdiv(visible, BLOCK_N) - first_tile
    share = tl.maximum(tl.cdiv(tiles, splits), 1)
    begin = first_tile + tl.minimum(split * share, tiles)
    end = first_tile + tl.minimum((split + 1) * share, tiles)
    return first, begin * BLOCK_N, end * BLOCK_N, tl.cdiv(tiles, share)


@triton.jit
def store_new_row(
    source_ptr,
    cache_ptr,
    scales_ptr,
    table_ptr,
    source,
    head,
    heads,
    position,
    pages,
    page_length,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store one row of T as the row of a token of one head, for this program to read."""
    one = tl.arange(0, 1)
    page, offset, inside = places(table_ptr, position + one, one == 0, page_length, pages)
    target = (page * heads + head) * page_length + offset
    store_rows(source_ptr, cache_ptr, scales_ptr, source + one, target, inside, DIM, DIM_PADDED, BITS, GROUP)
    tl.debug_barrier()


@triton.jit
def single_token_map(
    query_ptr,
    key_ptr,
    sinks_ptr,
    quantised_ptr,
    row,
    kept,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The map of a fresh row with one token and sinks: what a head gives its sink tells it from others."""
    heads = tl.arange(0, HEADS_PADDED)
    valid = heads < HEADS
    query_row = query_ptr + (row * HEADS + heads) * HEAD_DIM
    key_row = key_ptr + (row * KV_HEADS + heads // (HEADS // KV_HEADS)) * HEAD_DIM
    score = tl.zeros([HEADS_PADDED], tl.float32)
    for start in range(0, HEAD_DIM, CHUNK):
        d = start + tl.arange(0, CHUNK)
        mask = valid[:, None] & (d < HEAD_DIM)[None, :]
        query = tl.load(query_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        key = tl.load(key_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        score += tl.sum(query * key, axis=1)
    score = capped(score * scale, softcap, SOFTCAP)
    sink = tl.load(sinks_ptr + heads, mask=valid, other=0.0).to(tl.float32)
    largest = tl.maximum(score, sink)
    weight = tl.exp(score - largest)
    probability = tl.div_rn(weight, weight + tl.exp(sink - largest))
    steps = (probability * QUANTISATION_STEPS + ROUNDING_MAGIC) - ROUNDING_MAGIC
    quantised_row = quantised_ptr + row * HEADS
    tl.store(quantised_row + heads, steps.to(tl.int32), mask=valid)
    tl.debug_barrier()
    nearest, nearest_index = group_distances(quantised_row, HEADS, KV_HEADS, 1, HEADS_PADDED, KV_PADDED)
    return clustered_map(nearest, nearest_index, kept, HEADS, KV_HEADS, HEADS_PADDED, KV_PADDED)


@triton.jit(do_not_specialize=["capacity", "kept", "pages", "page_length", "window", "online"])
def decode_scores_kernel(
    query_ptr,
    key_ptr,
    sinks_ptr,
    page_table_ptr,
    past_head_map_ptr,
    past_lengths_ptr,
    lengths_ptr,
    present_head_map_ptr,
    key_cache_ptr,
    key_scales_ptr,
    quantised_ptr,
    scores_ptr,
    counters_ptr,
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
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of one slot, for GROUP_BLOCK query heads of its KV head. Grid (splits, R * blocks, B)."""
    group: tl.constexpr = HEADS // KV_HEADS
    blocks: tl.constexpr = (group + GROUP_BLOCK - 1) // GROUP_BLOCK
    slot = tl.program_id(1) // blocks
    row = tl.program_id(2).to(tl.int64)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, 1, capacity)
    if (online != 0) & (past == 0) & (new > 0):
        head_map = first_heads_map(kept, HEADS, KV_HEADS, HEADS_PADDED)
        if SINKS:  # decided when compiling  # noqa: SIM102
            if kept < KV_HEADS:
                head_map = single_token_map(
                    query_ptr, key_ptr, sinks_ptr, quantised_ptr, row, kept, scale, softcap, HEADS, KV_HEADS,
                    HEAD_DIM, HEADS_PADDED, KV_PADDED, SOFTCAP,
                )  # fmt: skip
        passed_on = head_map
    else:
        passed_on, head_map = stored_map(past_head_map_ptr + row * HEADS, HEADS, HEADS_PADDED)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        heads = tl.arange(0, HEADS_PADDED)
        tl.store(present_head_map_ptr + row * HEADS + heads, passed_on, mask=heads < HEADS)
        count: tl.constexpr = KV_HEADS * blocks
        counter = tl.arange(0, triton.next_power_of_2(KV_HEADS * blocks))
        nothing = tl.zeros_like(counter)
        tl.store(counters_ptr + row * count + counter, nothing, mask=counter < count)
    visible = past + new
    first, begin, end, _ = split_range(visible, window, tl.program_id(0), tl.num_programs(0), BLOCK_N)
    if (new == 0) | (begin >= end):
        return
    kv_heads = tl.arange(0, KV_PADDED)
    slots = kept_slots(head_map, kept, HEADS, KV_HEADS, KV_PADDED)
    kv_head = tl.max(tl.where(slots == slot, kv_heads, -1), axis=0)
    if kv_head < 0:
        return
    table_ptr = page_table_ptr + row * (capacity // page_length)
    if past < end:
        store_new_row(
            key_ptr, key_cache_ptr, key_scales_ptr, table_ptr, row * KV_HEADS + kv_head, slot, kept, past,
            pages, page_length, HEAD_DIM, HEAD_DIM_PADDED, KEY_BITS, GROUP,
        )  # fmt: skip
    j = tl.program_id(1) % blocks * GROUP_BLOCK + tl.arange(0, GROUP_BLOCK)
    d = tl.arange(0, HEAD_DIM_PADDED)
    in_query = (j < group)[:, None] & (d < HEAD_DIM)[None, :]
    query_row = query_ptr + (row * HEADS + kv_head * group) * HEAD_DIM
    query = tl.load(query_row + j[:, None] * HEAD_DIM + d[None, :], mask=in_query, other=0.0)
    columns = tl.cdiv(capacity, BLOCK_N) * BLOCK_N
    target = scores_ptr + ((row * kept + slot) * group + j)[:, None] * columns
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = (n >= first) & (n < visible)
        page, offset, inside = places(table_ptr, n, seen, page_length, pages)
        key = load_rows(
            key_cache_ptr, key_scales_ptr, (page * kept + slot) * page_length + offset, inside, HEAD_DIM,
            HEAD_DIM_PADDED, KEY_BITS, GROUP,
        )  # fmt: skip
        no_scores = tl.zeros([GROUP_BLOCK, BLOCK_N], tl.float32)
        scores = product(query, tl.trans(key.to(query.dtype)), no_scores, INTERPRETED) * scale
        scores = capped(scores, softcap, SOFTCAP) * LOG2_E
        tl.store(target + n[None, :], scores, mask=(j < group)[:, None] & seen[None, :])


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
