"""What a bundle is compared with: logits that are right, and how far from them a right engine may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.choices import Heads
from chai_export.quality.reference import fixed_maps, oracle_of
from chai_export.quality.rounding import TIES, rounding, stored_tolerances, tolerances

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.bundle import Bundle


@dataclass(frozen=True)
class Expected:
    """Right logits of one sequence, float32 [T, V], and the largest right difference from them, [T].

    ``exact`` are those of the model that caches its rows as they are computed, where the bundle does not, and
    ``exact_tolerances`` the largest right difference from those.
    """

    logits: NDArray[np.float32]
    tolerances: NDArray[np.float64]
    exact: NDArray[np.float32] | None = None
    exact_tolerances: NDArray[np.float64] | None = None


class Truth(Protocol):
    """Another computation of the same model, on one fresh sequence at a time."""

    def all_heads(self, token_ids: Sequence[int]) -> Expected:
        """The model as it is."""

    def chai(self, token_ids: Sequence[int], head_maps: NDArray[np.int32]) -> Expected:
        """The op's semantics under given head maps, int32 [L, H]."""

    def head_maps(self, token_ids: Sequence[int]) -> NDArray[np.int32]:
        """The maps that the op's rule gives the sequence: int32 [L, H]."""


class TorchTruth:
    """A Hugging Face model with the bundle's rounded weights, in float32, and the torch oracle on it.

    Where the bundle caches rows in fewer bits the oracle does so too, with all heads as well.
    """

    def __init__(self, model: PreTrainedModel, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._model = model
        self._dtype = manifest.dtype
        self._rounds = manifest.storage.rounds
        self._oracles = {heads: oracle_of(model, bundle, heads) for heads in Heads}
        self._exact = oracle_of(model, bundle, exact=True)
        self._fixed = fixed_maps(manifest)
        identity = np.arange(manifest.num_query_heads, dtype=np.int32)
        self._identity = np.tile(identity, (manifest.num_layers, 1))

    def all_heads(self, token_ids: Sequence[int]) -> Expected:
        """The model as transformers runs it, or the oracle with all heads on the rows that are stored."""
        from chai_export.models.oracle import model_logits

        exact = self._expected(partial(model_logits, self._model, token_ids))
        return self._stored(exact, Heads.ALL, token_ids, self._identity)

    def chai(self, token_ids: Sequence[int], head_maps: NDArray[np.int32]) -> Expected:
        """The oracle under given maps."""
        exact = self._expected(partial(self._exact.logits, token_ids, head_maps))
        return self._stored(exact, Heads.CHAI, token_ids, head_maps)

    def head_maps(self, token_ids: Sequence[int]) -> NDArray[np.int32]:
        """By the oracle from the probe; with static membership those of the manifest."""
        if self._fixed is not None:
            return self._fixed
        oracle = self._oracles[Heads.CHAI]
        oracle.logits(token_ids[: oracle.probe_tokens])
        return oracle.head_maps[:, 0]

    def _expected(self, run: Callable[[], NDArray[np.float32]]) -> Expected:
        plain = run()
        with rounding(self._model, self._dtype):
            return Expected(plain, tolerances(plain, run()))

    def _stored(
        self, exact: Expected, heads: Heads, token_ids: Sequence[int], head_maps: NDArray[np.int32]
    ) -> Expected:
        """What a cache of fewer bits makes of ``exact``."""
        if not self._rounds:
            return exact
        from chai_export.models.stored_rows import StoredRounding

        run = partial(self._oracles[heads].logits, token_ids, head_maps)
        plain = run()
        with rounding(self._model, self._dtype):
            moved = run(stored=StoredRounding(TIES))
        allowed = stored_tolerances(plain, moved, exact.tolerances)
        return Expected(plain, allowed, exact.logits, exact.tolerances)
