"""Attention of one new token per row (S = 1) in three passes, so that each cached byte is read once.

1. ``decode_scores_kernel``  K of each kept head once: softmax weights of all its query heads, relative to the
                             largest score of their tile of BLOCK_N tokens, and each tile's maximum and sum.
2. ``decode_values_kernel``  V of each KV head once for all its query heads, whatever clusters they are in,
                             with the weights of their representatives; one partial result per split.
3. ``decode_merge_kernel``   the splits' partial results into the output.

Passes 1 and 2 are split over the cache length. The number of splits comes from shapes, their bounds from
the lengths on the device. Cutting at the weights instead of at the clusters costs one write of R*q and one
read of H weights per cached token, and needs no thought about cluster sizes: one large cluster costs what
eight equal ones do.

Contract
    reads     query [B,H,1,D], present_key, present_value rows 0 … n, plan (see head_map.py)
    workspace weights T [B, R*q, tiles * BLOCK_N], tile_max and tile_sum float32 [B, R*q, tiles],
              tiles = ceil(C / BLOCK_N); partial float32 [B, H, splits, Dv], partial_max and partial_sum
              float32 [B, H, splits]
    writes    output [B,1,H*Dv], zero for inactive rows
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from chai_export.kernels.device.product import product
from chai_export.kernels.device.rows import row_lengths

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def split_length(visible, splits, BLOCK_N: tl.constexpr):
    """Tokens per split: equal shares of the visible tokens, whole tiles."""
    return tl.cdiv(tl.cdiv(visible, splits), BLOCK_N) * BLOCK_N


@triton.jit(do_not_specialize=["capacity", "kept"])
def decode_scores_kernel(
    query_ptr,
    past_lengths_ptr,
    lengths_ptr,
    plan_ptr,
    present_key_ptr,
    weights_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    capacity,
    kept,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
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
    visible = past + new
    length = split_length(visible, tl.num_programs(0), BLOCK_N)
    first = tl.program_id(0) * length
    kv_head = tl.load(plan_ptr + row * (2 * KV_HEADS + 2 * HEADS + 1) + KV_HEADS + slot)
    if (new == 0) | (first >= visible) | (kv_head < 0):
        return
    j = tl.program_id(1) % blocks * GROUP_BLOCK + tl.arange(0, GROUP_BLOCK)
    d = tl.arange(0, HEAD_DIM_PADDED)
    in_query = (j < group)[:, None] & (d < HEAD_DIM)[None, :]
    query_row = query_ptr + (row * HEADS + kv_head * group) * HEAD_DIM
    query = tl.load(query_row + j[:, None] * HEAD_DIM + d[None, :], mask=in_query, other=0.0)
    key_ptr = present_key_ptr + (row * kept + slot) * capacity * HEAD_DIM
    tiles = tl.cdiv(capacity, BLOCK_N)
    score_row = (row * kept + slot) * group + j
    for start in range(first, tl.minimum(first + length, visible), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_key = (n < visible)[None, :] & (d < HEAD_DIM)[:, None]
        key = tl.load(key_ptr + n[None, :] * HEAD_DIM + d[:, None], mask=in_key, other=0.0)
        no_scores = tl.zeros([GROUP_BLOCK, BLOCK_N], tl.float32)
        scores = product(query, key, no_scores, INTERPRETED) * (scale * LOG2_E)
        scores = tl.where((n < visible)[None, :], scores, float("-inf"))
        tile_max = tl.max(scores, axis=1)
        weights = tl.exp2(scores - tile_max[:, None])
        in_group = j < group
        tile = score_row * tiles + start // BLOCK_N
        tl.store(tile_max_ptr + tile, tile_max, mask=in_group)
        tl.store(tile_sum_ptr + tile, tl.sum(weights, axis=1), mask=in_group)
        target = weights_ptr + score_row[:, None] * (tiles * BLOCK_N) + n[None, :]
        tl.store(target, weights.to(weights_ptr.dtype.element_ty), mask=in_group[:, None])


@triton.jit(do_not_specialize=["capacity", "kept"])
def decode_values_kernel(
    past_lengths_ptr,
    lengths_ptr,
    plan_ptr,
    present_value_ptr,
    weights_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    partial_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    capacity,
    kept,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    length = split_length(visible, splits, BLOCK_N)
    first = split * length
    if (new == 0) | (first >= visible):
        return
    j = tl.program_id(1) % blocks * GROUP_BLOCK + tl.arange(0, GROUP_BLOCK)
    e = tl.arange(0, VALUE_DIM_PADDED)
    in_group = j < group
    score_rows = plan_ptr + row * (2 * KV_HEADS + 2 * HEADS + 1) + 2 * KV_HEADS + kv_head * group
    score_row = row * kept * group + tl.load(score_rows + j, mask=in_group, other=0)
    tiles = tl.cdiv(capacity, BLOCK_N)
    value_ptr = present_value_ptr + (row * KV_HEADS + kv_head) * capacity * VALUE_DIM
    row_max = tl.full([GROUP_BLOCK], LOWEST, tl.float32)
    row_sum = tl.zeros([GROUP_BLOCK], tl.float32)
    total = tl.zeros([GROUP_BLOCK, VALUE_DIM_PADDED], tl.float32)
    for start in range(first, tl.minimum(first + length, visible), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_value = (n < visible)[:, None] & (e < VALUE_DIM)[None, :]
        value = tl.load(value_ptr + n[:, None] * VALUE_DIM + e[None, :], mask=in_value, other=0.0)
        source = weights_ptr + score_row[:, None] * (tiles * BLOCK_N) + n[None, :]
        weights = tl.load(source, mask=in_group[:, None], other=0.0)
        tile = score_row * tiles + start // BLOCK_N
        tile_max = tl.load(tile_max_ptr + tile, mask=in_group, other=LOWEST)
        tile_sum = tl.load(tile_sum_ptr + tile, mask=in_group, other=0.0)
        new_max = tl.maximum(row_max, tile_max)
        shrink = tl.exp2(row_max - new_max)
        tile_scale = tl.exp2(tile_max - new_max)
        row_sum = row_sum * shrink + tile_sum * tile_scale
        row_max = new_max
        weights = (weights.to(tl.float32) * tile_scale[:, None]).to(value.dtype)
        total = product(weights, value, total * shrink[:, None], INTERPRETED)
    partial = ((row * HEADS + kv_head * group + j) * splits) + split
    tl.store(partial_max_ptr + partial, row_max, mask=in_group)
    tl.store(partial_sum_ptr + partial, row_sum, mask=in_group)
    target = partial_ptr + partial[:, None] * VALUE_DIM + e[None, :]
    tl.store(target, total, mask=in_group[:, None] & (e < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["capacity", "splits"])
def decode_merge_kernel(
    past_lengths_ptr,
    lengths_ptr,
    partial_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    output_ptr,
    capacity,
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One query head of one row. Grid (H, B)."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, 1, capacity)
    visible = past + new
    used = tl.cdiv(visible, tl.maximum(split_length(visible, splits, BLOCK_N), 1))
    used = tl.where(new > 0, used, 0)
    e = tl.arange(0, VALUE_DIM_PADDED)
    first = (row * HEADS + head) * splits
    row_max = tl.full([], LOWEST, tl.float32)
    row_sum = tl.zeros([], tl.float32)
    total = tl.zeros([VALUE_DIM_PADDED], tl.float32)
    for start in range(0, used, BLOCK_SPLITS):
        s = start + tl.arange(0, BLOCK_SPLITS)
        split_max = tl.load(partial_max_ptr + first + s, mask=s < used, other=LOWEST)
        split_sum = tl.load(partial_sum_ptr + first + s, mask=s < used, other=0.0)
        in_partial = (s < used)[:, None] & (e < VALUE_DIM)[None, :]
        partial = tl.load(
            partial_ptr + (first + s)[:, None] * VALUE_DIM + e[None, :], mask=in_partial, other=0.0
        )
        new_max = tl.maximum(row_max, tl.max(split_max, axis=0))
        shrink = tl.exp2(row_max - new_max)
        split_scale = tl.where(s < used, tl.exp2(split_max - new_max), 0.0)
        row_sum = row_sum * shrink + tl.sum(split_sum * split_scale, axis=0)
        total = total * shrink + tl.sum(partial * split_scale[:, None], axis=0)
        row_max = new_max
    attended = tl.where(new > 0, total / tl.where(new > 0, row_sum, 1.0), 0.0)
    target = output_ptr + (row * HEADS + head) * VALUE_DIM + e
    tl.store(target, attended.to(output_ptr.dtype.element_ty), mask=e < VALUE_DIM)
