"""Choosing the next token from logits, in the order that transformers applies its processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError, UsageError

DEFAULT_TOP_K = 50
"""What transformers takes when neither the caller nor the model names a top_k."""


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen. Temperature 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"--top-k is {self.top_k}; give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}; give a number above 0 and up to 1 (off)")
        if self.repetition_penalty <= 0:
            raise UsageError(f"the repetition penalty is {self.repetition_penalty}; give a number above 0")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; give 0 or more")


class Sampler:
    """Chooses the tokens of one row. Each row has a generator of its own, seeded alike.

    So a text depends on its prompt and the seed, never on what else is in the batch; equal prompts with
    one seed give equal texts.
    """

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)

    def choose(self, logits: NDArray[np.float32], context: Sequence[int]) -> int:
        """The next token id.

        Args:
            logits: float32 [V].
            context: prompt and text so far, for the repetition penalty.

        Raises:
            ChaiError: the logits are not finite.
        """
        if not np.isfinite(logits.max()):
            raise ChaiError(
                "the model's logits are not finite; export with --dtype float32 instead of float16"
            )
        settings = self._settings
        if settings.repetition_penalty != 1.0:
            logits = _penalised(logits, context, settings.repetition_penalty)
        if settings.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = candidates(logits, settings)
        mass = probabilities.cumsum()
        chosen = np.searchsorted(mass, self._random.random() * mass[-1], side="right")
        return int(tokens[min(int(chosen), len(tokens) - 1)])


def candidates(
    logits: NDArray[np.float32], settings: SamplingSettings
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that survive temperature, top-k and top-p (ascending ids) and their probabilities (sum 1).

    As in transformers, tokens that tie with the k-th stay, and top-p keeps the token that crosses the mass.
    """
    scores = logits.astype(np.float64) / settings.temperature
    tokens = np.arange(len(scores))
    if 0 < settings.top_k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -settings.top_k)[-settings.top_k])
    probabilities = _softmax(scores[tokens])
    if settings.top_p < 1:
        rising = np.argsort(probabilities, kind="stable")
        dropped = probabilities[rising].cumsum() <= 1 - settings.top_p
        dropped[-1] = False
        kept = np.sort(rising[~dropped])
        tokens, probabilities = tokens[kept], probabilities[kept] / probabilities[kept].sum()
    return tokens, probabilities


def _penalised(logits: NDArray[np.float32], context: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """Logits of tokens seen before, divided by the penalty if positive and multiplied if negative."""
    seen = np.unique(np.asarray(context, np.int64))
    changed = logits.copy()
    changed[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return changed


def _softmax(scores: NDArray[Any]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights
