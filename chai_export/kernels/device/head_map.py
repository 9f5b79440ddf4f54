"""The head map of each row and the plan that the other kernels read from it. Runs when S > 1.

Contract
    grid      (B,)
    reads     quantised int32 [B, P*P, H] of fresh rows when R < G; past_head_map [B,H] of the others
    writes    present_head_map int32 [B,H]
              plan int32 [B, 2G + 2H + 1]: slot of each KV head | KV head of each slot | score row of each
              query head | query heads ordered into pieces | number of full pieces
    numerics  integers only: distances int32, sums of distances int64

Pieces: a cluster is cut into groups of MEMBERS query heads ("full pieces"); what is left over forms single
pieces. The order lists the heads of the full pieces first, then the single ones.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from chai_export.kernels.device.rows import (
    first_heads_map,
    kept_slots,
    row_lengths,
    store_slots,
    stored_map,
)

UNASSIGNED_DISTANCE = tl.constexpr(1 << 40)
OUT_OF_REACH = tl.constexpr(1 << 60)
FAR = tl.constexpr(0x7FFFFFFF)
UNROLL = tl.constexpr(8)


@triton.jit
def group_distances(
    quantised_ptr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PROBE: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
):
    """Distance of each query head to each KV head (its nearest query head), and which query head that is.

    Both int32 [HEADS_PADDED, KV_PADDED]; the second is the index within the KV head, lowest on a tie.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    heads = tl.arange(0, HEADS_PADDED)
    kv_heads = tl.arange(0, KV_PADDED)
    nearest = tl.full([HEADS_PADDED, KV_PADDED], FAR, tl.int32)
    nearest_index = tl.zeros([HEADS_PADDED, KV_PADDED], tl.int32)
    for index in range(group):
        distance = tl.zeros([HEADS_PADDED, KV_PADDED], tl.int32)
        for entry in range(0, PROBE * PROBE, UNROLL):
            for ahead in tl.static_range(UNROLL):
                inside = entry + ahead < PROBE * PROBE
                entry_ptr = quantised_ptr + (entry + ahead) * HEADS
                a = tl.load(entry_ptr + heads, mask=(heads < HEADS) & inside, other=0)
                b = tl.load(
                    entry_ptr + kv_heads * group + index, mask=(kv_heads < KV_HEADS) & inside, other=0
                )
                distance += tl.abs(a[:, None] - b[None, :])
        nearest_index = tl.where(distance < nearest, index, nearest_index)
        nearest = tl.minimum(nearest, distance)
    return nearest, nearest_index


@triton.jit
def clustered_map(
    nearest,
    nearest_index,
    kept,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
):
    """Choose KV heads, then the nearest representative; ties go to the lower index.

    2 * kept steps: the KV heads chosen in the last ``kept`` of them stay, so in the second half each step
    first drops the oldest choice. ``stamp`` is the step in which a KV head was last chosen.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    heads = tl.arange(0, HEADS_PADDED)
    kv_heads = tl.arange(0, KV_PADDED)
    to_kv = nearest.to(tl.int64)
    stamp = tl.full([KV_PADDED], 0, tl.int32) - kept
    for step in range(2 * kept):
        stays = stamp > step - kept
        reached = tl.min(tl.where(stays[None, :], to_kv, UNASSIGNED_DISTANCE), axis=1)
        cost = tl.where((heads < HEADS)[:, None], tl.minimum(reached[:, None], to_kv), 0)
        excluded = stays | (kv_heads >= KV_HEADS)
        best = tl.argmin(tl.where(excluded, OUT_OF_REACH, tl.sum(cost, axis=0)), axis=0)
        stamp = tl.where(kv_heads == best, step, stamp)
    is_kept = stamp >= kept
    closest = tl.argmin(tl.where(is_kept[None, :], to_kv, OUT_OF_REACH), axis=1)
    at_closest = kv_heads[None, :] == closest[:, None]
    index = tl.max(tl.where(at_closest, nearest_index, 0), axis=1)
    own = (heads // group)[:, None] == kv_heads[None, :]
    keeps_own = tl.max((own & is_kept[None, :]).to(tl.int32), axis=1) > 0
    return tl.where(keeps_own, heads, closest * group + index)


@triton.jit
def store_pieces(plan_ptr, head_map, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, MEMBERS: tl.constexpr):
    """Second part of a row's plan: the query heads ordered into pieces, then the number of full pieces."""
    heads = tl.arange(0, HEADS_PADDED)
    valid = heads < HEADS
    together = (head_map[:, None] == head_map[None, :]) & valid[:, None] & valid[None, :]
    size = tl.sum(together.to(tl.int32), axis=1)
    rank = tl.sum((together & (heads[None, :] < heads[:, None])).to(tl.int32), axis=1)
    in_full = valid & (rank < size // MEMBERS * MEMBERS)
    cluster_before = head_map[None, :] < head_map[:, None]
    before_full = in_full[None, :] & (cluster_before | (together & (heads[None, :] < heads[:, None])))
    single = valid & (in_full == 0)
    before_single = single[None, :] & (heads[None, :] < heads[:, None])
    num_full = tl.sum(in_full.to(tl.int32), axis=0)
    position = tl.where(
        in_full,
        tl.sum(before_full.to(tl.int32), axis=1),
        num_full + tl.sum(before_single.to(tl.int32), axis=1),
    )
    tl.store(plan_ptr + position, heads, mask=valid)
    tl.store(plan_ptr + HEADS, num_full // MEMBERS)


@triton.jit(do_not_specialize=["tokens", "capacity", "kept", "online"])
def head_map_kernel(
    quantised_ptr,
    past_head_map_ptr,
    past_lengths_ptr,
    lengths_ptr,
    present_head_map_ptr,
    plan_ptr,
    tokens,
    capacity,
    kept,
    online,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PROBE: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
):
    """One row: decide or pass on its map, then write its plan."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_PADDED)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, tokens, capacity)
    target = present_head_map_ptr + row * HEADS + heads
    fresh = (online != 0) & (past == 0) & (new > 0)
    if fresh:
        if kept < KV_HEADS:
            nearest, nearest_index = group_distances(
                quantised_ptr + row * PROBE * PROBE * HEADS, HEADS, KV_HEADS, PROBE, HEADS_PADDED, KV_PADDED
            )
            head_map = clustered_map(nearest, nearest_index, kept, HEADS, KV_HEADS, HEADS_PADDED, KV_PADDED)
        else:
            head_map = first_heads_map(kept, HEADS, KV_HEADS, HEADS_PADDED)
        tl.store(target, head_map, mask=heads < HEADS)
    else:
        passed_on, head_map = stored_map(past_head_map_ptr + row * HEADS, HEADS, HEADS_PADDED)
        tl.store(target, passed_on, mask=heads < HEADS)
    slots = kept_slots(head_map, kept, HEADS, KV_HEADS, KV_PADDED)
    plan_row = plan_ptr + row * (2 * KV_HEADS + 2 * HEADS + 1)
    store_slots(plan_row, head_map, slots, kept, HEADS, KV_HEADS, HEADS_PADDED, KV_PADDED)
    store_pieces(plan_row + 2 * KV_HEADS + HEADS, head_map, HEADS, HEADS_PADDED, MEMBERS)
