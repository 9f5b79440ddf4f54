"""One attention problem of a benchmark: its shape, and memory that all implementations share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bench.phase import Phase
from chai_export.op.attributes import DEFAULT_GROUP
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.storage import Storage

Tensor = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """A benchmark case. ``length`` is T: positions attended to by a decoded token, or tokens of a prompt.

    ``key_bits`` and ``value_bits`` are the storage of CHAI's caches: 0 (``dtype``), 16, 8 or 4.
    """

    phase: Phase
    batch: int
    heads: int
    kv_heads: int
    kept: int
    head_dim: int
    length: int
    dtype: str = "float32"
    key_bits: int = 0
    value_bits: int = 0

    @property
    def tokens(self) -> int:
        """New tokens per row (S)."""
        return 1 if self.phase is Phase.DECODE else self.length

    @property
    def past(self) -> int:
        """Tokens in the cache before the call (n)."""
        return self.length - self.tokens

    @property
    def group(self) -> int:
        """Elements that share a scale where caches are quantised: 32, or what of it divides the head dim."""
        return math.gcd(self.head_dim, DEFAULT_GROUP)

    @property
    def bits(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.key_bits, self.value_bits

    @property
    def ceiling(self) -> float:
        """What attention can gain over all heads in ``dtype``: 2G / (R + G) where CHAI stores that too."""
        return self.cache_bytes / self.bytes_read

    @property
    def cache_bytes(self) -> int:
        """Bytes of full K and V caches in ``dtype``."""
        return self._cache_bytes(self.kv_heads, (0, 0))

    @property
    def bytes_read(self) -> int:
        """Bytes of cache, scales included, that a decoded token must read with R kept KV heads."""
        return self._cache_bytes(self.kept, self.bits)

    def _cache_bytes(self, kept: int, bits: tuple[int, int]) -> int:
        item = ELEMENT_TYPES[self.dtype].item_size
        key, value = (Storage(stored, self.head_dim, self.group).row_bytes(item) for stored in bits)
        return self.batch * self.length * (kept * key + self.kv_heads * value)


class Problem:
    """Inputs of one case. The caches are as long as the case needs and full up to ``past``.

    The values are random and repeat after a few megabytes, which no implementation can notice.
    """

    def __init__(self, case: Shape) -> None:
        self.case = case
        rng = np.random.default_rng(0)
        self._pattern = (rng.standard_normal(1 << 20) / 2).astype(case.dtype)
        new = (case.batch, case.kv_heads, case.tokens, case.head_dim)
        cache = (case.batch, case.kv_heads, case.length, case.head_dim)
        self.query = self._filled((case.batch, case.heads, case.tokens, case.head_dim), 1)
        self.key = self._filled(new, 2)
        self.value = self._filled(new, 3)
        self.key_cache = self._filled(cache, 4)
        self.value_cache = self._filled(cache, 5)
        self.key_cache[:, :, case.past :] = self.key
        self.value_cache[:, :, case.past :] = self.value

    def _filled(self, shape: tuple[int, ...], offset: int) -> Tensor:
        size = int(np.prod(shape))
        array = np.empty(size, self._pattern.dtype)
        start = offset * 7919
        for begin in range(0, size, self._pattern.size):
            part = array[begin : begin + self._pattern.size]
            part[:] = np.roll(self._pattern, start + 104729 * (begin // self._pattern.size))[: part.size]
        return array.reshape(shape)

    def compact_keys(self, kept: int) -> Tensor:
        """Keys [B, kept, T, D] of a K cache with so many KV heads: the front of the problem's own."""
        case = self.case
        size = case.batch * kept * case.length * case.head_dim
        return self.key_cache.reshape(-1)[:size].reshape(case.batch, kept, case.length, case.head_dim)

    def op_inputs(self, kept: int) -> dict[str, Tensor]:
        """Inputs of the op with ``kept`` KV heads, but for the caches and their table."""
        case = self.case
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "past_head_map": np.tile(head_map(case.heads, case.kv_heads, kept), (case.batch, 1)),
            "past_lengths": np.full(case.batch, case.past, np.int32),
            "lengths": np.full(case.batch, case.tokens, np.int32),
        }


def head_map(heads: int, kv_heads: int, kept: int) -> NDArray[np.int32]:
    """The paper's kind of clusters: one large, the rest single heads. KV heads 0 … kept-1 represent."""
    group = heads // kv_heads
    kv_head = np.arange(heads) // group
    return np.where(kv_head < kept, np.arange(heads), np.arange(heads) % group).astype(np.int32)
