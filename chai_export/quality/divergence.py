"""How far a model with shared scores moves from the model with all heads: streaming sums over a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.models.logits import kl_divergence, log_probabilities, row_parts

_RANGES = 32
"""Ranges of positions, each twice as long as the one before: enough for any sequence."""


@dataclass(frozen=True)
class PositionRange:
    """Mean divergence of the predictions made at some positions.

    Attributes:
        first: index of the first token in its sequence, 0 for the first one, special tokens included.
        last: of the last one, inclusive.
        tokens: predictions made there.
        kl: mean KL(all heads || shared), nats.
    """

    first: int
    last: int
    tokens: int
    kl: float


class Divergence:
    """Sums of loss, KL divergence and top-1 agreement; memory does not grow with the text."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nll_all = 0.0
        self._nll = 0.0
        self._kl = 0.0
        self._agreed = 0
        self._range_kl: NDArray[np.float64] = np.zeros(_RANGES)
        self._range_counts: NDArray[np.int64] = np.zeros(_RANGES, dtype=np.int64)

    def add(
        self,
        every: NDArray[np.float32],
        shared: NDArray[np.float32],
        targets: NDArray[np.integer[Any]],
        *,
        first_position: int = 0,
    ) -> None:
        """Add one window.

        Args:
            every: logits with all heads, float32 [T, V].
            shared: logits with shared scores, float32 [T, V].
            targets: the T tokens that follow; row i predicts ``targets[i]``.
            first_position: position of row 0 in its sequence, for figures by position.
        """
        for part in row_parts(len(targets)):
            log_all, log_shared = log_probabilities(every[part]), log_probabilities(shared[part])
            kl = kl_divergence(log_all, log_shared)
            rows = np.arange(len(kl))
            self._nll_all -= float(log_all[rows, targets[part]].sum())
            self._nll -= float(log_shared[rows, targets[part]].sum())
            self._agreed += int((log_all.argmax(axis=-1) == log_shared.argmax(axis=-1)).sum())
            self._kl += float(kl.sum())
            places = np.frexp(rows + (first_position + part.start))[
                1
            ]  # the number of bits, which names the range
            self._range_kl += np.bincount(places, weights=kl, minlength=_RANGES)
            self._range_counts += np.bincount(places, minlength=_RANGES)
        self.tokens += len(targets)

    @property
    def nll_all(self) -> float:
        """Loss with all heads, nats per token."""
        return self._nll_all / self.tokens

    @property
    def nll_change_sum(self) -> float:
        """Loss with shared scores less loss with all heads, nats over all tokens."""
        return self._nll - self._nll_all

    @property
    def nll(self) -> float:
        """Loss with shared scores, nats per token."""
        return self._nll / self.tokens

    @property
    def kl(self) -> float:
        """Mean KL(all heads || shared), nats per token."""
        return max(0.0, self._kl / self.tokens)

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same most probable token."""
        return self._agreed / self.tokens

    @property
    def perplexity_change(self) -> float:
        """Perplexity with shared scores over perplexity with all heads, minus one."""
        return math.expm1(self.nll - self.nll_all)

    @property
    def kl_by_position(self) -> list[PositionRange]:
        """Mean KL at positions 0, 1, 2-3, 4-7 and so on of a sequence, where there are predictions."""
        return [
            PositionRange(*_range_of(index), tokens=int(count), kl=max(0.0, float(total) / int(count)))
            for index, (count, total) in enumerate(zip(self._range_counts, self._range_kl, strict=True))
            if count
        ]


def _range_of(index: int) -> tuple[int, int]:
    """First and last position of a range: 0-0, 1-1, 2-3, 4-7, …"""
    return (0, 0) if index == 0 else (1 << (index - 1), (1 << index) - 1)
