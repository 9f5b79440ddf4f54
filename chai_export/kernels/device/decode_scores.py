"""The first launch of a decode step (S = 1): the scores of all query heads, each stored key read once.

Attention of one new token per row is two launches:

1. ``decode_scores_kernel``  the new key row stored, then K of each kept head read once: scores of all its
                             query heads. It also passes the head map on and clears the counters of pass 2.
2. ``decode_values_kernel``  (:mod:`.decode_values`) the new value row stored, then V read once.

Both are split over the tokens that the row sees. The number of splits comes from shapes, their bounds from
the lengths on the device. A program whose tokens include the new one stores it itself and reads it after a
barrier: what is read is what is stored, and no launch is needed for it. Programs that share a split store the
same bytes. The counters are cleared in the launch before the one that counts, so that a call depends on no
earlier one, in CUDA graphs neither. One pass cannot do both: a query head may need the scores of any slot.

Contract
    grid      (splits, R * blocks, B); runs when S = 1
    reads     query [B,H,1,D], key [B,G,1,D], past_head_map, the stored keys that the token sees
    workspace scores float32 [B, R*q, tiles * BLOCK_N] in base 2, scaled and capped, tiles = ceil(C / BLOCK_N)
              quantised int32 [B, H] for fresh rows with sinks
    writes    the new rows of the keys' pool; present_head_map [B,H]; counters int32 [B, G * blocks], zero
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from chai_export.kernels.device.head_map import clustered_map, group_distances
from chai_export.kernels.device.pages import first_visible, places
from chai_export.kernels.device.probe import QUANTISATION_STEPS
from chai_export.kernels.device.product import product
from chai_export.kernels.device.rows import first_heads_map, kept_slots, row_lengths, stored_map
from chai_export.kernels.device.storage import ROUNDING_MAGIC, load_rows, store_rows
from chai_export.kernels.device.terms import LOG2_E, capped

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
