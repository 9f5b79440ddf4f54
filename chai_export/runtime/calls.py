"""Which rows of a step go through the graph together.

A call computes its number of rows times its longest row, so rows of unlike lengths pay for padding, while
each call reads all weights once more. The rule: of all ways to divide the rows, in the order of their
lengths, the one that computes the fewest tokens, where a call counts as :data:`CALL_TOKENS` tokens more; of
equals, the one whose call with the longest rows has the most rows, and so on down.
tests/data/paging_cases.json holds every runner to it.
"""

from __future__ import annotations

from collections.abc import Sequence

CALL_TOKENS = 16
"""What a call costs beyond its tokens, in tokens: reading the weights, where few tokens share it.

Float32 products with 84 million weights on two cores took 21 ms and 1.17 ms a token, for 16 to 512 tokens.
"""


def plan_calls(lengths: Sequence[int]) -> list[list[int]]:
    """Divide rows into calls, the one with the shortest rows first.

    Args:
        lengths: new tokens of each row, at least 1.

    Returns:
        Indices into ``lengths``, ascending in each call.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    # least[n] is the cost of the n shortest rows, the last of whose calls begins at first[n].
    least, first = [0], [0]
    for count in range(1, len(order) + 1):
        longest = lengths[order[count - 1]]
        cost, start = min((least[s] + (count - s) * longest + CALL_TOKENS, s) for s in range(count))
        least.append(cost)
        first.append(start)
    calls, end = [], len(order)
    while end:
        calls.append(sorted(order[first[end] : end]))
        end = first[end]
    return calls[::-1]
