"""The memory of a pool of pages: one buffer for each layer and part, reserved once and never moved.

``np.empty`` reserves addresses; the system gives memory to a page of the pool when something is written to
it. So a pool may be as large as its rows can ever need, and growing is writing further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from chai_export.bundle.choices import Heads
from chai_export.bundle.graph_io import PAGE_LENGTH, kept_sizes, pool_pages
from chai_export.bundle.manifest import Manifest
from chai_export.errors import ChaiError
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.units import bytes_text

_SHARE = 0.9
"""Of the free memory, for caches; the rest is for activations and other programs."""


class KvCache:
    """Pools by the name of the graph's input: keys, values, and their scales where they are quantised.

    What has not been written is undefined: the op never reads it.

    Args:
        manifest: of the bundle.
        heads: that the K caches hold.
        pages: of the pools of layers, by their window; 0: none.
        page_length: positions of a page.

    Raises:
        ChaiError: the system does not reserve so many addresses.
    """

    def __init__(
        self, manifest: Manifest, heads: Heads | str, pages: Mapping[int, int], page_length: int
    ) -> None:
        sizes = {PAGE_LENGTH: page_length, **kept_sizes(manifest.heads(heads))}
        sizes |= {pool_pages(window): count for window, count in pages.items()}
        self.arrays: dict[str, NDArray[Any]] = {}
        for cache in manifest.io.caches:
            shape, item = cache.past.shape(sizes), ELEMENT_TYPES[cache.past.dtype].numpy
            try:
                self.arrays[cache.past.name] = np.empty(shape, item)
            except (
                MemoryError
            ) as error:  # a limit on addresses (ulimit -v), or a system that promises no more
                items = manifest.kv_bytes_by_window(heads).items()
                size = bytes_text(sum(pages[window] * page_length * item for window, item in items))
                raise ChaiError(
                    f"the system does not reserve {size} for KV caches; lower --cache-memory, --max-seq or "
                    "--max-new-tokens, or raise its limit (ulimit -v)"
                ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, touched or not."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class Budget:
    """Bytes that caches may take, and what a user can do if they are too few."""

    size: int
    fix: str

    @staticmethod
    def now(limit: int | None, free: int | None = None, memory: str = "memory") -> Budget:
        """``limit`` (``--cache-memory``), or most of the memory that is free where that is less.

        Args:
            limit: bytes, or None.
            free: bytes of the memory that caches lie in. Default: the system's.
            memory: what a user calls it.
        """
        free = available_memory() if free is None else free
        most = int(free * _SHARE)
        if limit is not None and limit <= most:
            return Budget(limit, f"raise --cache-memory ({bytes_text(limit)})")
        return Budget(most, f"free {memory} ({bytes_text(free)} are free)")


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def memory_error(rows: int, tokens: int, needed: int, budget: Budget) -> ChaiError:
    """The error of caches that do not fit."""
    return ChaiError(
        f"a KV cache for {rows} rows of {tokens} tokens takes {bytes_text(needed)} and it may take "
        f"{bytes_text(budget.size)}; lower --max-seq, give shorter or fewer prompts, or {budget.fix}"
    )
