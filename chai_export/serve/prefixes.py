"""What earlier texts left in the cache: a tree of pages by the tokens in them.

A child holds the page that follows its parent's, of every pool: a stack. All pages but the last of a branch
are whole, so the tree is a radix tree whose letters are pages. Of a page whose tokens agree with a prompt in
part, the part is copied.

Of layers with a window a text leaves the pages that its coming tokens would have seen. A beginning can be
taken over where all that its next token sees is there: where a text ended or its prompt did, or, for windows
longer than what came after, further up.

The pages of a branch hold rows of the kept heads of one head map, which its first ``probe_tokens`` tokens
decide; so a beginning of at least that many tokens can be taken over with its map, and gives what computing
it again would give.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from chai_export.runtime.row_pages import RowPages, Stack

HeadMap = NDArray[np.int32]
Tokens = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    """One page of each pool. ``used`` grows with every use of it."""

    tokens: Tokens
    stack: Stack
    head_map: HeadMap | None
    parent: _Node | None
    used: int = 0
    children: dict[Tokens, _Node] = field(default_factory=dict)
    order: list[Tokens] = field(default_factory=list)

    def add(self, child: _Node) -> None:
        self.children[child.tokens] = child
        insort(self.order, child.tokens)

    def remove(self, child: _Node) -> None:
        del self.children[child.tokens]
        del self.order[bisect_left(self.order, child.tokens)]

    def nearest(self, tokens: Tokens) -> tuple[_Node | None, int]:
        """The child that agrees with most of the first ``tokens``, and with how many."""
        at = bisect_left(self.order, tokens)
        found = [(_common(self.order[i], tokens), i) for i in (at - 1, at) if 0 <= i < len(self.order)]
        length, index = max(found, default=(0, -1))
        return (self.children[self.order[index]], length) if length else (None, 0)


@dataclass(frozen=True)
class Prefix:
    """A beginning that the cache holds: whole pages, ``stacks``, then ``part`` of its tokens in one more."""

    tokens: int
    stacks: tuple[Stack, ...]
    part: Stack | None
    head_map: HeadMap


class PrefixTree:
    """Beginnings of texts in ``pages``, which it retains.

    Texts that are rotated otherwise (``side``, see :class:`~chai_export.bundle.manifest.RopeRecord`) have
    trees of their own.
    """

    def __init__(self, pages: RowPages, probe_tokens: int) -> None:
        self._pages = pages
        self._length = pages.whole.page_length
        self._probe = probe_tokens
        self._roots: dict[int, _Node] = {}
        self._clock = count(1)
        self.pages = 0

    def find(self, ids: Sequence[int], side: int = 0) -> Prefix | None:
        """The longest beginning of ``ids`` that is here with all that its next token sees, without the last
        token of ``ids``, or None.

        The last token is computed in any case, since the next one is chosen by what it gives.
        """
        node = self._roots.get(side)
        if node is None:
            return None
        now, tokens = next(self._clock), 0
        path: list[tuple[int, _Node]] = []
        while tokens < len(ids) - 1:
            wanted = tuple(ids[tokens : min(tokens + self._length, len(ids) - 1)])
            child, agreed = node.nearest(wanted)
            if child is None:
                break
            child.used = now
            node = child
            tokens += agreed
            path.append((tokens, child))
            if agreed < self._length:
                break
        stacks = [each.stack for _, each in path]
        while path and path[-1][0] >= self._probe:
            tokens, node = path.pop()
            if node.head_map is not None and self._pages.holds_view(stacks, tokens):
                seen = self._pages.view(stacks, tokens)
                whole = tokens // self._length
                part = seen[whole] if tokens % self._length else None
                return Prefix(tokens, tuple(seen[:whole]), part, node.head_map)
            stacks.pop()
        return None

    def add(self, ids: Sequence[int], stacks: Sequence[Stack], head_map: HeadMap, side: int = 0) -> None:
        """Keep ``stacks`` that hold ``ids``, at least the probe; what is here already is not kept twice."""
        assert len(ids) >= self._probe
        node = self._roots.setdefault(side, _Node((), (), None, None))
        now = next(self._clock)
        for start, stack in zip(range(0, len(ids), self._length), stacks, strict=False):
            tokens = tuple(ids[start : start + self._length])
            child, agreed = node.nearest(tokens)
            if child is not None and agreed < len(tokens) and agreed == len(child.tokens):
                self._drop(child)  # an end that the new page goes on from
                child = None
            elif agreed < len(tokens):
                child = None
            if child is None:
                self._pages.retain([stack])
                self.pages += 1
                child = _Node(tokens, stack, head_map, node)
                node.add(child)
            else:
                child.stack = self._pages.completed(child.stack, stack)
            child.used = now
            if len(tokens) < self._length:
                break
            node = child

    def make_room(self, lacking: Mapping[int, int]) -> bool:
        """Give back pages of the pools that lack some, by window; whether there were any.

        Args:
            lacking: pages by window; nothing where memory is short, but not pages.
        """
        if lacking and 0 not in lacking:
            return self._strip(lacking)
        return self.evict(lacking.get(0, 1)) > 0

    def _strip(self, lacking: Mapping[int, int]) -> bool:
        """Forget pages of windows that no row holds, least recently used first; whether there were any."""
        left, freed = dict(lacking), 0
        for node in sorted(self._nodes(), key=lambda each: each.used):
            windows = [window for window, pages in left.items() if pages > 0]
            if not windows:
                break
            node.stack, gone = self._pages.strip(node.stack, windows)
            for window in gone:
                left[window] -= 1
            freed += len(gone)
        return freed > 0

    def evict(self, pages: int) -> int:
        """Forget up to so many pages that no row holds, least recently used first; how many were freed."""
        free = [(n.used, id(n), n) for n in self._nodes() if not n.children and self._unused(n)]
        heapq.heapify(free)
        freed = 0
        while free and freed < pages:
            node = heapq.heappop(free)[2]
            parent = node.parent
            self._drop(node)
            freed += 1
            if parent is not None and parent.stack and not parent.children and self._unused(parent):
                heapq.heappush(free, (parent.used, id(parent), parent))
        return freed

    def clear(self) -> None:
        """Forget all."""
        self._pages.forget(node.stack for node in self._nodes())
        self._roots.clear()
        self.pages = 0

    def _unused(self, node: _Node) -> bool:
        return self._pages.references(node.stack) == 1

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None
        assert not node.children
        node.parent.remove(node)
        self._pages.forget([node.stack])
        self.pages -= 1

    def _nodes(self) -> Iterator[_Node]:
        left = [child for root in self._roots.values() for child in root.children.values()]
        while left:
            node = left.pop()
            yield node
            left.extend(node.children.values())


def _common(a: Tokens, b: Tokens) -> int:
    """Tokens in which two sequences agree from the first on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
