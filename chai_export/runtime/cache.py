"""The key and value caches of one batch: compact K, full V, one pair of arrays per layer that has a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from chai_export.bundle.choices import Heads
from chai_export.bundle.graph_io import BATCH, CAPACITY, kept_sizes
from chai_export.bundle.manifest import Manifest
from chai_export.errors import ChaiError
from chai_export.op.dtypes import ELEMENT_TYPES

MOST_TOKENS = 1 << 30


class KvCache:
    """K caches [B,R_i,C,D] and V caches [B,G,C,Dv] by the name of the graph's input.

    What has not been written is undefined: the op never reads it.
    """

    def __init__(self, manifest: Manifest, heads: Heads | str, batch: int, capacity: int) -> None:
        self.batch = batch
        self.capacity = capacity
        sizes = {BATCH: batch, CAPACITY: capacity, **kept_sizes(manifest.heads(heads))}
        shapes = {cache.past.name: cache.past.shape(sizes) for cache in manifest.io.caches}
        item = ELEMENT_TYPES[manifest.dtype].numpy
        self.nbytes = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()) * item.itemsize
        require_memory(self.nbytes, batch, capacity)
        self.arrays: dict[str, NDArray[Any]] = {name: np.empty(shape, item) for name, shape in shapes.items()}

    def copy_from(self, other: KvCache) -> None:
        """Take over all positions of a smaller cache of the same batch."""
        assert other.batch == self.batch
        assert other.capacity <= self.capacity
        for name, array in other.arrays.items():
            self.arrays[name][:, :, : other.capacity] = array


def grown_capacity(capacity: int, needed: int, limit: int = MOST_TOKENS) -> int:
    """``capacity`` doubled until it holds ``needed`` tokens, but no more than ``limit``."""
    assert needed <= limit
    while capacity < needed:
        capacity *= 2
    return min(capacity, limit)


def require_memory(needed: int, batch: int, capacity: int) -> None:
    """Raise ChaiError unless ``needed`` bytes of memory are free, before they are asked for."""
    available = psutil.virtual_memory().available
    if needed > available:
        raise ChaiError(
            f"a KV cache for {batch} rows of {capacity} tokens takes {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB are free; lower --max-seq or give shorter or fewer prompts"
        )
