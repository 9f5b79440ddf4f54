"""What changes a score after query times key: the soft cap. Sinks and slopes are a line where they count.

Softmax is computed in base 2, so scores and sinks are multiplied by log2(e).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def capped(scores, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(scores / softcap) in float32 where SOFTCAP is set."""
    if SOFTCAP:
        # exp(-2|x|) is at most 1: no overflow, and the error stays that of one float32 operation.
        shrunk = tl.exp(-2.0 * tl.abs(scores) / softcap)
        size = softcap * (1.0 - shrunk) / (1.0 + shrunk)
        scores = tl.where(scores < 0.0, -size, size)
    return scores
