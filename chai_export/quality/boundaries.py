"""Lengths at which rotary embedding changes or a window begins to hide, and how `verify` crosses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

MOST_TOKENS = 1024
"""Longest text that `verify` computes to cross a boundary: some passes of it are bearable on a CPU."""

_BEYOND = 2


@dataclass(frozen=True)
class Boundary:
    """A length in tokens, whether texts on both sides of it were compared, and if not, why."""

    length: int
    crossed: bool
    reason: str | None = None


def find_boundaries(lengths: Iterable[int], limit: int | None) -> list[Boundary]:
    """Which of ``lengths`` can be crossed by a bundle of ``limit`` positions, None for no limit."""
    return [_boundary(length, limit) for length in sorted(set(lengths))]


def _boundary(length: int, limit: int | None) -> Boundary:
    if limit is not None and length + _BEYOND > limit:
        return Boundary(length, False, f"the bundle ends at {limit} positions, so no text grows past it")
    if length + _BEYOND > MOST_TOKENS:
        reason = f"texts of {length + _BEYOND} tokens are longer than the {MOST_TOKENS} that verify computes"
        return Boundary(length, False, reason)
    return Boundary(length, True)


def lengths_around(boundary: Boundary) -> tuple[int, int]:
    """The longest text below a boundary that is crossed, and one above it."""
    return boundary.length, boundary.length + _BEYOND


def stretches(prompt: int, total: int, switch_lengths: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Where a text was generated with one set of rotary factors: ranges of its tokens from ``prompt`` on.

    Token i was chosen when the text had i tokens, so one switch at T divides tokens up to T from later ones.
    """
    cuts = [length + 1 for length in sorted(switch_lengths) if prompt < length + 1 < total]
    edges = [prompt, *cuts, total]
    yield from pairwise(edges)


def pieces(total: int, probe: int) -> list[int]:
    """Chunks to feed a text in: the probe, then two large ones and a single token."""
    rest = total - probe
    parts = [min(probe, total), rest // 2, rest - rest // 2 - 1, 1] if rest > 1 else [min(probe, total), rest]
    return [part for part in parts if part > 0]
