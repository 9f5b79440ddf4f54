"""Matrix product with float32 accumulation, the one place that says how precise products are."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def product(a, b, accumulator, INTERPRETED: tl.constexpr):
    """``a @ b + accumulator``, float32 [M, N]; float32 operands are multiplied in IEEE precision, not TF32.

    Triton's interpreter multiplies the bit patterns of bfloat16 operands (3.9); widening them is exact and
    avoids that. On a GPU it would only cost speed.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
