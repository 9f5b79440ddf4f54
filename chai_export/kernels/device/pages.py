"""Where the positions of a row lie in the pools, and which of them a call may touch.

The page table lives on the device: an entry that is no page of the pool is never followed, so that no address
leaves the pools whatever the table holds.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def places(table_ptr, positions, wanted, page_length, pages):
    """Page (int64) and offset in it of positions, all [BLOCK], and which of the wanted ones have a page."""
    index = positions // page_length
    page = tl.load(table_ptr + index, mask=wanted, other=-1)
    inside = wanted & (page >= 0) & (page < pages)
    return tl.where(inside, page, 0).to(tl.int64), positions - index * page_length, inside


@triton.jit
def first_visible(position, window):
    """The first position that a token at a position sees; a window of 0 is none."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
