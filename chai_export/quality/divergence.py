"""How far a model with shared scores moves from the model with all heads: streaming sums over a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.quality.compare import kl_divergence, log_probabilities

if TYPE_CHECKING:
    from chai_export.runtime.runner import Runner

_ROWS = 128
"""Positions compared at a time: with a vocabulary of 128 k, 128 rows are 130 MB a copy in float64."""


class Divergence:
    """Sums of loss, KL divergence and top-1 agreement; memory does not grow with the text."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nll_all = 0.0
        self._nll = 0.0
        self._kl = 0.0
        self._agreed = 0
        self._kl_by_position: NDArray[np.float64] = np.zeros(0)
        self._count_by_position: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def add(
        self,
        every: NDArray[np.float32],
        shared: NDArray[np.float32],
        targets: NDArray[np.integer[Any]],
    ) -> None:
        """Add one window.

        Args:
            every: logits with all heads, float32 [T, V].
            shared: logits with shared scores, float32 [T, V].
            targets: the T tokens that follow; position i of the window predicts ``targets[i]``.
        """
        self._make_room(len(targets))
        for start in range(0, len(targets), _ROWS):
            part = slice(start, min(start + _ROWS, len(targets)))
            log_all, log_shared = log_probabilities(every[part]), log_probabilities(shared[part])
            kl = kl_divergence(log_all, log_shared)
            rows = np.arange(len(kl))
            self._nll_all -= float(log_all[rows, targets[part]].sum())
            self._nll -= float(log_shared[rows, targets[part]].sum())
            self._agreed += int((log_all.argmax(axis=-1) == log_shared.argmax(axis=-1)).sum())
            self._kl += float(kl.sum())
            self._kl_by_position[part] += kl
            self._count_by_position[part] += 1
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

    def kl_by_position(self, width: int) -> list[float]:
        """Mean KL of positions 0 … width-1, width … 2·width-1, and so on, nats."""
        starts = range(0, len(self._kl_by_position), width)
        return [
            float(self._kl_by_position[start : start + width].sum())
            / int(self._count_by_position[start : start + width].sum())
            for start in starts
        ]

    def _make_room(self, length: int) -> None:
        missing = length - len(self._kl_by_position)
        if missing > 0:
            self._kl_by_position = np.pad(self._kl_by_position, (0, missing))
            self._count_by_position = np.pad(self._count_by_position, (0, missing))


def first_differing_tokens(chai: Runner, every: Runner, prompts: Sequence[str], count: int) -> list[int]:
    """Where greedy generation first departs from the one with all heads.

    Args:
        chai: a bundle with ``heads="chai"``.
        every: the same bundle with ``heads="all"``.
        prompts: prompts.
        count: tokens to generate at most.

    Returns:
        For each prompt how many tokens are the same before the first that differs; the length of the
        longer generation when none does.
    """
    pairs = zip(
        chai.generate(list(prompts), max_new_tokens=count),
        every.generate(list(prompts), max_new_tokens=count),
        strict=True,
    )
    return [first_difference(one.token_ids, other.token_ids) for one, other in pairs]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common start of two sequences."""
    same = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same += 1
    return same
