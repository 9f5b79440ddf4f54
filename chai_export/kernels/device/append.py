"""New key and value rows into the caches: nothing past n+m, no padding, no unused slot is written.

Two kernels with one contract. ``append_kernel`` (S > 1) reads the slots from the plan of ``head_map_kernel``.
``decode_begin_kernel`` (S = 1) finds them itself, and leaves the map and the plan to the kernels after it.

Contract
    reads     key [B,G,S,D], value [B,G,S,Dv] of tokens 0 … m-1
    writes    present_key [B,R,C,D] at slot(g), present_value [B,G,C,Dv] at g, rows n … n+m-1
              decode_begin: present_head_map [B,H] and the slots in the plan (program g = 0 of each row)
    grid      append: (ceil(S / BLOCK_TOKENS), G, B); decode_begin: (G, B)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from chai_export.kernels.device.rows import (
    UNUSED,
    first_heads_map,
    kept_slots,
    row_lengths,
    store_slots,
    stored_map,
)


@triton.jit
def copy_rows(
    source_ptr,
    target_ptr,
    first,
    end,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Rows first … min(first + BLOCK_TOKENS, end) - 1 of [*, DIM] from source to the same rows of target."""
    i = first + tl.arange(0, BLOCK_TOKENS)
    d = tl.arange(0, DIM_PADDED)
    inside = (i < end)[:, None] & (d < DIM)[None, :]
    offsets = i[:, None] * DIM + d[None, :]
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["tokens", "capacity", "kept"])
def append_kernel(
    key_ptr,
    value_ptr,
    past_lengths_ptr,
    lengths_ptr,
    plan_ptr,
    present_key_ptr,
    present_value_ptr,
    tokens,
    capacity,
    kept,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One block of new tokens of one KV head."""
    first = tl.program_id(0) * BLOCK_TOKENS
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, tokens, capacity)
    if first >= new:
        return
    kv_row = row * KV_HEADS + kv_head
    source = value_ptr + kv_row * tokens * VALUE_DIM
    target = present_value_ptr + (kv_row * capacity + past) * VALUE_DIM
    copy_rows(source, target, first, new, VALUE_DIM, VALUE_DIM_PADDED, BLOCK_TOKENS)
    slot = tl.load(plan_ptr + row * (2 * KV_HEADS + 2 * HEADS + 1) + kv_head)
    if slot != UNUSED:
        source = key_ptr + kv_row * tokens * HEAD_DIM
        target = present_key_ptr + ((row * kept + slot) * capacity + past) * HEAD_DIM
        copy_rows(source, target, first, new, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_TOKENS)


@triton.jit(do_not_specialize=["capacity", "kept", "online"])
def decode_begin_kernel(
    key_ptr,
    value_ptr,
    past_head_map_ptr,
    past_lengths_ptr,
    lengths_ptr,
    present_head_map_ptr,
    plan_ptr,
    present_key_ptr,
    present_value_ptr,
    capacity,
    kept,
    online,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
):
    """One KV head of one row with at most one new token."""
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, 1, capacity)
    if (online != 0) & (past == 0) & (new > 0):
        head_map = first_heads_map(kept, HEADS, KV_HEADS, HEADS_PADDED)
        passed_on = head_map
    else:
        passed_on, head_map = stored_map(past_head_map_ptr + row * HEADS, HEADS, HEADS_PADDED)
    slots = kept_slots(head_map, kept, HEADS, KV_HEADS, KV_PADDED)
    if kv_head == 0:
        heads = tl.arange(0, HEADS_PADDED)
        tl.store(present_head_map_ptr + row * HEADS + heads, passed_on, mask=heads < HEADS)
        plan_row = plan_ptr + row * (2 * KV_HEADS + 2 * HEADS + 1)
        store_slots(plan_row, head_map, slots, kept, HEADS, KV_HEADS, HEADS_PADDED, KV_PADDED)
    if new > 0:
        kv_row = row * KV_HEADS + kv_head
        target = present_value_ptr + (kv_row * capacity + past) * VALUE_DIM
        copy_rows(value_ptr + kv_row * VALUE_DIM, target, 0, 1, VALUE_DIM, VALUE_DIM_PADDED, 1)
        slot = tl.max(tl.where(tl.arange(0, KV_PADDED) == kv_head, slots, UNUSED), axis=0)
        if slot != UNUSED:
            target = present_key_ptr + ((row * kept + slot) * capacity + past) * HEAD_DIM
            copy_rows(key_ptr + kv_row * HEAD_DIM, target, 0, 1, HEAD_DIM, HEAD_DIM_PADDED, 1)
