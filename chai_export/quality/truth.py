"""What a bundle is compared with: logits that are right, and how far from them a right engine may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from chai_export.quality.reference import fixed_maps, oracle_of
from chai_export.quality.rounding import rounding, tolerances

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.manifest import Manifest


@dataclass(frozen=True)
class Expected:
    """Right logits of one sequence, float32 [T, V], and the largest right difference from them, [T]."""

    logits: NDArray[np.float32]
    tolerances: NDArray[np.float64]


class Truth(Protocol):
    """Another computation of the same model, on one fresh sequence at a time."""

    def all_heads(self, token_ids: Sequence[int]) -> Expected:
        """The model as it is."""

    def chai(self, token_ids: Sequence[int], head_maps: NDArray[np.int32]) -> Expected:
        """The op's semantics under given head maps, int32 [L, H]."""

    def head_maps(self, token_ids: Sequence[int]) -> NDArray[np.int32]:
        """The maps that the op's rule gives the sequence: int32 [L, H]."""


class TorchTruth:
    """A Hugging Face model with the bundle's rounded weights, in float32, and the torch oracle on it."""

    def __init__(self, model: PreTrainedModel, manifest: Manifest) -> None:
        self._model = model
        self._dtype = manifest.dtype
        self._oracle = oracle_of(model, manifest)
        self._fixed = fixed_maps(manifest)

    def all_heads(self, token_ids: Sequence[int]) -> Expected:
        """The model as transformers runs it."""
        from chai_export.models.oracle import model_logits

        return self._expected(partial(model_logits, self._model, token_ids))

    def chai(self, token_ids: Sequence[int], head_maps: NDArray[np.int32]) -> Expected:
        """The oracle under given maps."""
        return self._expected(partial(self._oracle.logits, token_ids, head_maps))

    def head_maps(self, token_ids: Sequence[int]) -> NDArray[np.int32]:
        """By the oracle from the probe; with static membership those of the manifest."""
        if self._fixed is not None:
            return self._fixed
        self._oracle.logits(token_ids[: self._oracle.probe_tokens])
        return self._oracle.head_maps[:, 0]

    def _expected(self, run: Callable[[], NDArray[np.float32]]) -> Expected:
        plain = run()
        with rounding(self._model, self._dtype):
            return Expected(plain, tolerances(plain, run()))
