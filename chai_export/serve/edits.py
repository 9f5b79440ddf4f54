"""Changes of logits that a request asks for: biases of tokens, and penalties for tokens that a text has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class LogitBias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens = np.array(list(bias), np.int64)
        self._values = np.array(list(bias.values()), np.float32)

    def edit(self, logits: NDArray[np.float32], new_ids: Sequence[int]) -> None:
        """Add."""
        del new_ids
        logits[self._tokens] += self._values

    def chosen(self, token: int) -> None:
        """Nothing to note."""


class Penalties:
    """Lowers the logits of tokens that the text has: by ``presence`` once, by ``frequency`` for each time."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence = presence
        self._frequency = frequency
        self._seen: Counter[int] = Counter()

    def edit(self, logits: NDArray[np.float32], new_ids: Sequence[int]) -> None:
        """Subtract."""
        del new_ids
        if self._seen:
            times = np.array(list(self._seen.values()), np.float32)
            logits[list(self._seen)] -= self._presence + self._frequency * times

    def chosen(self, token: int) -> None:
        """Count it."""
        self._seen[token] += 1
