"""New key and value rows into the pools, as they are stored there: nothing else in them is written.

Contract
    grid      (ceil(S / BLOCK_TOKENS), G, B); runs when S > 1, a decode step appends in the kernels that read
    reads     key [B,G,S,D], value [B,G,S,Dv] of tokens 0 … m-1, plan (see kernels/device/head_map.py)
    writes    key_cache [N,R,L,D] at slot(g), value_cache [N,G,L,Dv] at g, and their scales, positions
              n … n+m-1 of the row by its page table
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from chai_export.kernels.device.pages import places
from chai_export.kernels.device.rows import UNUSED, row_lengths
from chai_export.kernels.device.storage import store_rows


@triton.jit(do_not_specialize=["tokens", "capacity", "kept", "pages", "page_length"])
def append_kernel(
    key_ptr,
    value_ptr,
    page_table_ptr,
    past_lengths_ptr,
    lengths_ptr,
    plan_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    tokens,
    capacity,
    kept,
    pages,
    page_length,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One block of new tokens of one KV head."""
    first = tl.program_id(0) * BLOCK_TOKENS
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, tokens, capacity)
    if first >= new:
        return
    i = first + tl.arange(0, BLOCK_TOKENS)
    table_ptr = page_table_ptr + row * (capacity // page_length)
    page, offset, inside = places(table_ptr, past + i, i < new, page_length, pages)
    sources = (row * KV_HEADS + kv_head) * tokens + i
    target = (page * KV_HEADS + kv_head) * page_length + offset
    store_rows(
        value_ptr, value_cache_ptr, value_scales_ptr, sources, target, inside, VALUE_DIM, VALUE_DIM_PADDED,
        VALUE_BITS, GROUP,
    )  # fmt: skip
    slot = tl.load(plan_ptr + row * (2 * KV_HEADS + 2 * HEADS + 1) + kv_head)
    if slot != UNUSED:
        target = (page * kept + slot) * page_length + offset
        store_rows(
            key_ptr, key_cache_ptr, key_scales_ptr, sources, target, inside, HEAD_DIM, HEAD_DIM_PADDED,
            KEY_BITS, GROUP,
        )  # fmt: skip
