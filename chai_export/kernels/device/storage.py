"""Rows as a pool stores them, in T, float16, 8 or 4 bits: what is written, and what is read back.

BITS is 0 (T), 16, 8 or 4; GROUP elements share a scale. The bytes are those of docs/op.md on every device:
float32 arithmetic, IEEE division, rounding half to even.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

# 1.5 * 2**23: adding and subtracting it rounds a float32 below 2**22 to an integer, half to even; what is
# larger stays larger than any code.
ROUNDING_MAGIC = tl.constexpr(12582912.0)
LARGEST_8 = tl.constexpr(127.0)
LARGEST_4 = tl.constexpr(15.0)


@triton.jit
def codes_of(x, scale, least, largest):
    """clamp(rint(x / scale)), 0 where the scale is 0. ``x`` float32 [A, K, J], ``scale`` float16 [A, K]."""
    divisor = tl.broadcast_to(scale.to(tl.float32)[:, :, None], x.shape)
    ratio = tl.div_rn(x, tl.where(divisor == 0.0, 1.0, divisor))
    code = (ratio + ROUNDING_MAGIC) - ROUNDING_MAGIC
    code = tl.minimum(tl.maximum(code, least), largest)
    return tl.where(divisor == 0.0, 0.0, code)


@triton.jit
def scale_of(spread, largest):
    """float16(spread / largest), [A, K]."""
    return tl.div_rn(spread, tl.zeros_like(spread) + largest).to(tl.float16)


@triton.jit
def store_rows(
    source_ptr,
    cache_ptr,
    scales_ptr,
    sources,
    rows,
    inside,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store rows ``sources`` of T [*, DIM] as rows ``rows`` (int64) of a pool; all [BLOCK]."""
    if (BITS == 8) | (BITS == 4):
        groups: tl.constexpr = DIM // GROUP
        k = tl.arange(0, triton.next_power_of_2(DIM // GROUP))
        if BITS == 8:
            j = tl.arange(0, triton.next_power_of_2(GROUP))
            column = k[:, None] * GROUP + j[None, :]
            in_row = (k < groups)[:, None] & (j < GROUP)[None, :]
            mask = inside[:, None, None] & in_row[None, :, :]
            x = tl.load(source_ptr + sources[:, None, None] * DIM + column[None, :, :], mask=mask, other=0.0)
            x = x.to(tl.float32)
            scale = scale_of(tl.max(tl.abs(x), axis=2), LARGEST_8)
            code = codes_of(x, scale, -LARGEST_8, LARGEST_8).to(tl.int8)
            tl.store(cache_ptr + rows[:, None, None] * DIM + column[None, :, :], code, mask=mask)
            target = scales_ptr + rows[:, None] * groups + k[None, :]
            tl.store(target, scale, mask=inside[:, None] & (k < groups)[None, :])
        else:
            half: tl.constexpr = GROUP // 2
            j = tl.arange(0, triton.next_power_of_2(GROUP // 2))
            byte = k[:, None] * half + j[None, :]
            in_row = (k < groups)[:, None] & (j < half)[None, :]
            mask = inside[:, None, None] & in_row[None, :, :]
            source = source_ptr + sources[:, None, None] * DIM + 2 * byte[None, :, :]
            even = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            odd = tl.load(source + 1, mask=mask, other=0.0).to(tl.float32)
            low = tl.min(tl.where(mask, tl.minimum(even, odd), float("inf")), axis=2)
            high = tl.max(tl.where(mask, tl.maximum(even, odd), float("-inf")), axis=2)
            in_groups = inside[:, None] & (k < groups)[None, :]
            low = tl.where(in_groups, low, 0.0).to(tl.float16)
            scale = scale_of(tl.where(in_groups, high - low.to(tl.float32), 0.0), LARGEST_4)
            base = low.to(tl.float32)[:, :, None]
            even_code = codes_of(even - base, scale, 0.0, LARGEST_4).to(tl.int32)
            odd_code = codes_of(odd - base, scale, 0.0, LARGEST_4).to(tl.int32)
            packed = (even_code | (odd_code << 4)).to(tl.uint8)
            tl.store(cache_ptr + rows[:, None, None] * (DIM // 2) + byte[None, :, :], packed, mask=mask)
            target = scales_ptr + rows[:, None] * (2 * groups) + k[None, :]
            tl.store(target, scale, mask=in_groups)
            tl.store(target + groups, low, mask=in_groups)
    else:
        d = tl.arange(0, DIM_PADDED)
        mask = inside[:, None] & (d < DIM)[None, :]
        x = tl.load(source_ptr + sources[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        if BITS == 16:
            x = x.to(tl.float32).to(tl.float16)
        tl.store(cache_ptr + rows[:, None] * DIM + d[None, :], x, mask=mask)


@triton.jit
def factors(
    scales_ptr,
    rows,
    inside,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The number of its group for each element, float32 [BLOCK, DIM_PADDED]; a row's begin at FIRST."""
    row = scales_ptr + rows[:, None] * COLUMNS + FIRST
    if (GROUP & (GROUP - 1)) == 0 and GROUP <= DIM_PADDED:
        # One load per group, spread in registers.
        k = tl.arange(0, DIM_PADDED // GROUP)
        mask = inside[:, None] & (k < DIM // GROUP)[None, :]
        of_group = tl.load(row + k[None, :], mask=mask, other=0.0).to(tl.float32)
        spread = tl.broadcast_to(of_group[:, :, None], [rows.shape[0], DIM_PADDED // GROUP, GROUP])
        result = tl.reshape(spread, [rows.shape[0], DIM_PADDED])
    else:
        d = tl.arange(0, DIM_PADDED)
        mask = inside[:, None] & (d < DIM)[None, :]
        result = tl.load(row + (d // GROUP)[None, :], mask=mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def load_rows(
    cache_ptr,
    scales_ptr,
    rows,
    inside,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows ``rows`` (int64 [BLOCK]) of a pool as [BLOCK, DIM_PADDED], zeros where not inside.

    Codes come as float32, other storage as it is.
    """
    if BITS == 4:
        byte = tl.arange(0, DIM_PADDED // 2)
        mask = inside[:, None] & (byte < DIM // 2)[None, :]
        packed = tl.load(cache_ptr + rows[:, None] * (DIM // 2) + byte[None, :], mask=mask, other=0)
        values = tl.interleave((packed & 15).to(tl.float32), (packed >> 4).to(tl.float32))
        groups: tl.constexpr = DIM // GROUP
        values *= factors(scales_ptr, rows, inside, 0, 2 * groups, DIM, DIM_PADDED, GROUP)
        values += factors(scales_ptr, rows, inside, groups, 2 * groups, DIM, DIM_PADDED, GROUP)
    else:
        d = tl.arange(0, DIM_PADDED)
        mask = inside[:, None] & (d < DIM)[None, :]
        values = tl.load(cache_ptr + rows[:, None] * DIM + d[None, :], mask=mask, other=0)
        if BITS == 8:
            values = values.to(tl.float32)
            values *= factors(scales_ptr, rows, inside, 0, DIM // GROUP, DIM, DIM_PADDED, GROUP)
    return values
