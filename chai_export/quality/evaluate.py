"""What clustering costs on a text: perplexity with all heads and with CHAI, and how often they agree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError, UsageError
from chai_export.models.text import Text, leading_special_tokens, read_tokens
from chai_export.progress import track
from chai_export.quality.compare import kl_divergence, log_probabilities
from chai_export.quality.limits import position_limit

if TYPE_CHECKING:
    from chai_export.runtime.runner import Runner

_MOST_TOKENS = 1 << 24


def evaluate(
    bundle: str | Path,
    text: Text | Iterable[Text],
    *,
    backend: str = "onnxruntime",
    max_tokens: int | None = None,
    window: int = 512,
) -> dict[str, Any]:
    """Perplexity of a bundle on a text with all heads and with CHAI, and their agreement.

    The text is cut into windows, each fed as a sequence of its own that starts as the tokenizer starts
    sequences. Every token of the text but a window's first, when nothing precedes it, is predicted once.
    Only one window's logits exist at a time.

    Args:
        bundle: directory of the bundle.
        text: a file, a text or token ids.
        backend: the engine to run.
        max_tokens: use so many tokens of the text at most.
        window: tokens per sequence.

    Returns:
        ``{"tokens": predicted tokens, "all": {"nll", "perplexity"}, "chai": {…}, "top1_agreement", "kl"}``:
        nll in nats per token, kl = mean KL(all || chai) in nats.

    Raises:
        ChaiError: the bundle or text cannot be used, or the text is shorter than two tokens.
        UsageError: a setting makes no sense.
    """
    from chai_export.runtime.runner import load

    if window < 2:
        raise UsageError(f"--window must be at least 2 tokens, not {window}")
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"--max-tokens must be at least 2, not {max_tokens}")
    chai = load(bundle, backend=backend, heads="chai")
    every = load(bundle, backend=backend, heads="all")
    tokenizer = chai.tokenizer
    leading = leading_special_tokens(tokenizer)
    _require_room(chai, window)
    if window <= len(leading) + 1:
        raise UsageError(f"--window {window} leaves no room beside the special tokens; raise it")
    tokens = read_tokens(text, tokenizer, min(max_tokens or _MOST_TOKENS, _MOST_TOKENS))
    sequences = cut_windows(tokens, leading, window)
    if not sequences:
        raise ChaiError(f"the text has {len(tokens)} tokens, too few to predict one; give more text")
    totals = _Totals()
    for sequence in track(sequences, "evaluating", total=len(sequences)):
        skip = max(0, len(leading) - 1)
        targets = np.asarray(sequence[skip + 1 :])
        totals.add(every.logits(sequence)[skip:-1], chai.logits(sequence)[skip:-1], targets)
    return totals.result()


def cut_windows(tokens: NDArray[np.int32], leading: list[int], window: int) -> list[list[int]]:
    """Consecutive sequences of ``window`` tokens, each with the leading special tokens; the last is shorter.

    A sequence in which nothing could be predicted is left out.
    """
    fresh = window - len(leading)
    cut = [leading + tokens[start : start + fresh].tolist() for start in range(0, len(tokens), fresh)]
    return [sequence for sequence in cut if len(sequence) >= max(2, len(leading) + 1)]


class _Totals:
    """Sums over windows."""

    def __init__(self) -> None:
        self._count = 0
        self._nll = {"all": 0.0, "chai": 0.0}
        self._agreed = 0
        self._kl = 0.0

    def add(
        self, every: NDArray[np.float32], chai: NDArray[np.float32], targets: NDArray[np.integer[Any]]
    ) -> None:
        """Add one window: logits [T, V] of both ways for the same T targets."""
        rows = np.arange(len(targets))
        log_all, log_chai = log_probabilities(every), log_probabilities(chai)
        self._count += len(targets)
        self._nll["all"] -= float(log_all[rows, targets].sum())
        self._nll["chai"] -= float(log_chai[rows, targets].sum())
        self._agreed += int((every.argmax(axis=-1) == chai.argmax(axis=-1)).sum())
        self._kl += float(kl_divergence(log_all, log_chai).sum())

    def result(self) -> dict[str, Any]:
        """The means, named as in the public contract."""
        figures: dict[str, Any] = {"tokens": self._count}
        for heads, total in self._nll.items():
            nll = total / self._count
            figures[heads] = {"nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf}
        figures["top1_agreement"] = self._agreed / self._count
        # Rounding can push the mean of equal distributions a hair below zero.
        figures["kl"] = max(0.0, self._kl / self._count)
        return figures


def _require_room(runner: Runner, window: int) -> None:
    limit = position_limit(runner)
    if limit is not None and window > limit:
        raise UsageError(f"--window {window} is longer than the {limit} positions the bundle has; lower it")
