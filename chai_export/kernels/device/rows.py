"""What every kernel asks about a batch row: its lengths, whether it is fresh, and which KV heads it keeps.

Lengths and maps live on the device and are clamped here, so that no address computed from them leaves its
tensor whatever they hold. A row that does not fit its cache (n + m > C) is treated as inactive.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

UNUSED = tl.constexpr(-1)


@triton.jit
def row_lengths(past_lengths_ptr, lengths_ptr, row, tokens, capacity):
    """Cached tokens n and new tokens m of a row; m is 0 for rows that are inactive or do not fit."""
    past = tl.minimum(tl.maximum(tl.load(past_lengths_ptr + row), 0), capacity)
    new = tl.minimum(tl.maximum(tl.load(lengths_ptr + row), 0), tokens)
    return past, tl.where(past + new <= capacity, new, 0)


@triton.jit
def stored_map(map_ptr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr):
    """A row's map as it is stored, int32 [HEADS_PADDED], and the same with entries forced into 0 … H-1.

    Padding repeats head 0's entry, so that it keeps no KV head of its own.
    """
    heads = tl.arange(0, HEADS_PADDED)
    entries = tl.load(map_ptr + tl.where(heads < HEADS, heads, 0))
    return entries, tl.minimum(tl.maximum(entries, 0), HEADS - 1)


@triton.jit
def first_heads_map(kept, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr):
    """The map of a fresh row with one token: all distances tie, so the first R KV heads are kept."""
    heads = tl.arange(0, HEADS_PADDED)
    return tl.where((heads // (HEADS // KV_HEADS) < kept) & (heads < HEADS), heads, 0)


@triton.jit
def kept_slots(head_map, kept, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KV_PADDED: tl.constexpr):
    """K-cache slot of each KV head, int32 [KV_PADDED]: ascending over kept heads, UNUSED for the others.

    A map that keeps more than R KV heads is the caller's error; the surplus heads get no slot.
    """
    kv_heads = tl.arange(0, KV_PADDED)
    is_kept = tl.max(((head_map // (HEADS // KV_HEADS))[:, None] == kv_heads[None, :]).to(tl.int32), axis=0)
    slot = tl.cumsum(is_kept, axis=0) - 1
    return tl.where((is_kept > 0) & (slot < kept), slot, UNUSED)


@triton.jit
def store_slots(
    plan_ptr,
    head_map,
    slots,
    kept,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
):
    """First part of a row's plan: slot of each KV head, KV head of each slot, score row of each query head.

    Score row of query head h: slot * q + (index of its representative within the KV head).
    """
    group: tl.constexpr = HEADS // KV_HEADS
    kv_heads = tl.arange(0, KV_PADDED)
    heads = tl.arange(0, HEADS_PADDED)
    used = tl.sum((slots >= 0).to(tl.int32), axis=0)
    tl.store(plan_ptr + kv_heads, slots, mask=kv_heads < KV_HEADS)
    kv_of_slot = plan_ptr + KV_HEADS
    tl.store(kv_of_slot + slots, kv_heads, mask=slots >= 0)
    tl.store(
        kv_of_slot + kv_heads,
        tl.full([KV_PADDED], UNUSED, tl.int32),
        mask=(kv_heads >= used) & (kv_heads < kept),
    )
    of_head = (head_map // group)[:, None] == kv_heads[None, :]
    slot_of_head = tl.max(tl.where(of_head, slots[None, :], 0), axis=1)
    tl.store(plan_ptr + 2 * KV_HEADS + heads, slot_of_head * group + head_map % group, mask=heads < HEADS)
