"""The first tokens of fresh rows, exactly: probe probabilities for the head map, and their attention output.

Contract
    grid      (H, B); programs of rows that are not fresh return at once
    reads     query [B,H,S,D], key [B,G,S,D], value [B,G,S,Dv] of tokens 0 … t-1, t = min(P, m), unquantised
    writes    quantised int32 [B, P*P, H]: rint(1024 p) half to even, zero past t and where nothing is seen
              output [B,S,H*Dv] rows 0 … t-1
    numerics  products and softmax in float32 (IEEE, never TF32) whatever the tensors' dtype
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from chai_export.kernels.device.rows import row_lengths
from chai_export.kernels.device.storage import ROUNDING_MAGIC
from chai_export.kernels.device.terms import capped

QUANTISATION_STEPS = tl.constexpr(1024.0)


@triton.jit(do_not_specialize=["tokens", "capacity", "window"])
def probe_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    past_lengths_ptr,
    lengths_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    quantised_ptr,
    output_ptr,
    tokens,
    capacity,
    window,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PROBE: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    PROBE_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """One query head of one fresh row."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    past, new = row_lengths(past_lengths_ptr, lengths_ptr, row, tokens, capacity)
    if (past > 0) | (new == 0):
        return
    probe = tl.minimum(new, PROBE)
    kv_row = row * KV_HEADS + head // (HEADS // KV_HEADS)
    i = tl.arange(0, PROBE_PADDED)
    d = tl.arange(0, HEAD_DIM_PADDED)
    e = tl.arange(0, VALUE_DIM_PADDED)

    in_query = (i < probe)[:, None] & (d < HEAD_DIM)[None, :]
    offsets = i[:, None] * HEAD_DIM + d[None, :]
    query = tl.load(query_ptr + (row * HEADS + head) * tokens * HEAD_DIM + offsets, mask=in_query, other=0.0)
    key = tl.load(key_ptr + kv_row * tokens * HEAD_DIM + offsets, mask=in_query, other=0.0)
    scores = tl.dot(query.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="ieee") * scale
    scores = capped(scores, softcap, SOFTCAP)
    distance = i[None, :] - i[:, None]
    if SLOPES:
        scores += tl.load(alibi_slopes_ptr + head) * distance.to(tl.float32)

    seen = (distance <= 0) & (i < probe)[:, None] & ((window == 0) | (distance > -window))
    scores = tl.where(seen, scores, -1.0e30)
    largest = tl.max(scores, axis=1)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        largest = tl.maximum(largest, sink)
    weights = tl.where(seen, tl.exp(scores - largest[:, None]), 0.0)
    total = tl.sum(weights, axis=1)
    if SINKS:
        total += tl.exp(sink - largest)
    total = tl.where(i < probe, total, 1.0)
    probabilities = tl.div_rn(weights, tl.broadcast_to(total[:, None], [PROBE_PADDED, PROBE_PADDED]))

    steps = (probabilities * QUANTISATION_STEPS + ROUNDING_MAGIC) - ROUNDING_MAGIC
    in_probe = (i < PROBE)[:, None] & (i < PROBE)[None, :]
    flat = (i[:, None] * PROBE + i[None, :]) * HEADS + head
    tl.store(quantised_ptr + row * PROBE * PROBE * HEADS + flat, steps.to(tl.int32), mask=in_probe)

    in_value = (i < probe)[:, None] & (e < VALUE_DIM)[None, :]
    value_offsets = i[:, None] * VALUE_DIM + e[None, :]
    value = tl.load(value_ptr + kv_row * tokens * VALUE_DIM + value_offsets, mask=in_value, other=0.0)
    attended = tl.dot(probabilities, value.to(tl.float32), input_precision="ieee")
    target = output_ptr + row * tokens * HEADS * VALUE_DIM + head * VALUE_DIM
    target_offsets = i[:, None] * (HEADS * VALUE_DIM) + e[None, :]
    tl.store(target + target_offsets, attended.to(output_ptr.dtype.element_ty), mask=in_value)
