"""Choosing the next token from logits, in the order that transformers applies its processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.arguments import shown
from chai_export.bundle.manifest import GenerationSettings
from chai_export.bundle.sampling_rules import wanted_instead
from chai_export.errors import ChaiError, UsageError
from chai_export.runtime.likeliest import Likeliest, Scores

_FLAGS = {name: f"--{name.replace('_', '-')}" for name in ("temperature", "top_k", "top_p", "seed")}
_LARGEST = float(np.finfo(np.float64).max)
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
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "seed":
                continue
            wanted = wanted_instead(field.name, value)
            if wanted is not None:
                raise UsageError(f"{_FLAGS.get(field.name, field.name)} is {shown(value)}; give {wanted}")
            # Numbers of other libraries would bring their own precision along.
            convert = int if field.name in ("top_k", "seed") else float
            object.__setattr__(self, field.name, convert(value))


def settings_for(
    model: GenerationSettings,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> SamplingSettings:
    """Settings whose gaps are filled with the model's own, and those with what transformers takes.

    Raises:
        UsageError: a value is out of range.
    """
    return SamplingSettings(
        temperature,
        _first(top_k, model.top_k, DEFAULT_TOP_K),
        _first(top_p, model.top_p, 1.0),
        _first(repetition_penalty, model.repetition_penalty, 1.0),
        seed,
    )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


class Sampler:
    """Chooses the tokens of one row. Each row has a generator of its own, seeded alike.

    So a text depends on its prompt and the seed, never on what else is in the batch; equal prompts with
    one seed give equal texts.
    """

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens decide the next one; None if all logits do."""
        settings = self._settings
        if settings.repetition_penalty != 1.0:
            return None
        return 1 if settings.temperature == 0 else settings.top_k or None

    def choose(self, logits: Scores, context: Sequence[int]) -> int:
        """The next token id.

        Args:
            logits: float32 [V], or more than :attr:`top` of the likeliest; the token is the same.
            context: prompt and text so far, for the repetition penalty.

        Raises:
            ChaiError: the logits are not finite.
        """
        if isinstance(logits, Likeliest):
            among = self._among(logits)
            if among is None:
                return self.choose(logits.every(), context)
            tokens, probabilities = among
        else:
            tokens, probabilities = self.distribution(logits, context)
        if len(tokens) == 1:
            return int(tokens[0])
        mass = probabilities.cumsum()
        chosen = np.searchsorted(mass, self._random.random() * mass[-1], side="right")
        return int(tokens[min(int(chosen), len(tokens) - 1)])

    def _among(self, likeliest: Likeliest) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """As :meth:`distribution`; None where the rest of the logits decides too, among equals."""
        count = self.top
        assert count is not None
        logits = likeliest.logits
        if not np.isfinite(logits[0]) or (count < len(logits) and logits[count - 1] == logits[count]):
            return None
        if self._settings.temperature == 0:
            return likeliest.tokens[:1], np.ones(1)
        rising = np.argsort(likeliest.tokens[:count])
        kept, probabilities = candidates(logits[:count][rising], self._settings)
        return likeliest.tokens[rising][kept], probabilities

    def distribution(
        self, logits: NDArray[np.float32], context: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What :meth:`choose` draws from: token ids, ascending, and their probabilities, which sum to 1.

        Raises:
            ChaiError: the logits are not finite.
        """
        if not np.isfinite(logits.max()):
            raise ChaiError(
                "the model's logits are not finite; export with --dtype float32 instead of float16"
            )
        settings = self._settings
        scores = logits.astype(np.float64)
        if settings.repetition_penalty != 1.0:
            scores = _penalised(scores, context, settings.repetition_penalty)
        if settings.temperature == 0:
            return np.array([scores.argmax()]), np.ones(1)
        return candidates(scores, settings)


def candidates(
    logits: NDArray[np.floating[Any]], settings: SamplingSettings
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that survive temperature, top-k and top-p (ascending ids) and their probabilities (sum 1).

    As in transformers, tokens that tie with the k-th stay, and top-p keeps the token that crosses the mass.
    """
    scores = logits.astype(np.float64)
    tokens = np.arange(len(scores))
    if 0 < settings.top_k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -settings.top_k)[-settings.top_k])
    probabilities = _softmax(scores[tokens], settings.temperature)
    if settings.top_p < 1:
        rising = np.argsort(probabilities, kind="stable")
        dropped = probabilities[rising].cumsum() <= 1 - settings.top_p
        dropped[-1] = False
        kept = np.sort(rising[~dropped])
        tokens, probabilities = tokens[kept], probabilities[kept] / probabilities[kept].sum()
    return tokens, probabilities


def _penalised(scores: NDArray[np.float64], context: Sequence[int], penalty: float) -> NDArray[np.float64]:
    """Scores of tokens seen before, divided by the penalty if positive and multiplied if negative.

    What overflows is the largest number there is; minus infinity, a token that never comes, stays.
    """
    seen = np.unique(np.asarray(context, np.int64))
    seen = seen[np.isfinite(scores[seen])]
    changed = scores.copy()
    with np.errstate(over="ignore"):
        moved = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    changed[seen] = np.clip(moved, -_LARGEST, _LARGEST)
    return changed


def _softmax(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Probabilities. The maximum is subtracted first, so a tiny temperature leaves just the likeliest."""
    with np.errstate(over="ignore"):
        weights: NDArray[np.float64] = np.exp((scores - scores.max()) / temperature)
    weights /= weights.sum()
    return weights
