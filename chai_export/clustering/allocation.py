"""The best choice of one option for each cache: smallest sum of damage for every sum of bytes, exactly.

Options of different caches add up in bytes and, supposedly, in damage; within a cache heads and precision are
chosen together, so nothing is supposed of how they act on each other. Dynamic programming over the caches, on
bytes in units of their greatest common divisor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Choice = tuple[int, ...]
"""The index of an option for each cache."""


class Frontier:
    """All best choices of options.

    Args:
        sizes: [caches][options], bytes, at least 1.
        damage: [caches][options], never negative; the options of different caches may differ in number.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], damage: Sequence[Sequence[float]]) -> None:
        self._useful = [_undominated(s, d) for s, d in zip(sizes, damage, strict=True)]
        self._sizes = [[s[i] for i in useful] for s, useful in zip(sizes, self._useful, strict=True)]
        self._unit = math.gcd(*(size for row in self._sizes for size in row))
        least = [min(row) for row in self._sizes]
        self._least = sum(least)
        extra = [
            [(size - low) // self._unit for size in row] for row, low in zip(self._sizes, least, strict=True)
        ]
        self._extra = extra
        states = sum(max(row) for row in extra) + 1
        best = np.full(states, np.inf)
        best[0] = 0.0
        self._choices: list[NDArray[np.int16]] = []
        for row, useful, costs in zip(extra, self._useful, damage, strict=True):
            reached = np.full(states, np.inf)
            chosen = np.zeros(states, np.int16)
            for place, (more, option) in enumerate(zip(row, useful, strict=True)):
                candidate = np.full(states, np.inf)
                candidate[more:] = best[: states - more] + costs[option]
                better = candidate < reached
                reached[better] = candidate[better]
                chosen[better] = place
            best = reached
            self._choices.append(chosen)
        self._best = best

    @property
    def least_bytes(self) -> int:
        """The smallest sum of bytes there is."""
        return self._least

    def bytes_of(self, choice: Choice) -> int:
        """Sum of bytes of a choice that this gave."""
        rows = zip(self._useful, self._sizes, choice, strict=True)
        return sum(sizes[useful.index(option)] for useful, sizes, option in rows)

    def within_damage(self, limit: float) -> Choice:
        """The fewest bytes whose damage is at most ``limit``; of those, the least damage.

        Raises:
            ValueError: there are none.
        """
        found = np.flatnonzero(self._best <= limit)
        if not found.size:
            raise ValueError(f"no choice has a damage of at most {limit}")
        return self._choice(int(found[0]))

    def within_bytes(self, limit: float) -> Choice:
        """The least damage with at most ``limit`` bytes; of those, the fewest bytes.

        Raises:
            ValueError: there are none.
        """
        states = math.floor((limit - self._least) / self._unit) + 1
        if states < 1:
            raise ValueError(f"no choice has at most {limit} bytes, the least is {self._least}")
        return self._choice(int(np.argmin(self._best[:states])))

    def _choice(self, state: int) -> Choice:
        reversed_choice = []
        for row, useful, chosen in zip(
            reversed(self._extra), reversed(self._useful), reversed(self._choices), strict=True
        ):
            place = int(chosen[state])
            reversed_choice.append(useful[place])
            state -= row[place]
        return tuple(reversed(reversed_choice))


def _undominated(sizes: Sequence[int], damage: Sequence[float]) -> list[int]:
    """The options worth a look, fewest bytes first: each does less damage than all that are no larger."""
    kept: list[int] = []
    least = math.inf
    for option in sorted(range(len(sizes)), key=lambda i: (sizes[i], damage[i])):
        if damage[option] < least:
            kept.append(option)
            least = damage[option]
    return kept
