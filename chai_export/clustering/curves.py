"""Error curves: what keeping k KV heads costs, for every k at once, summed up sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chai_export.op.head_map import QUANTISATION_STEPS, greedy_order, quantise, squared_distances


class ErrorCurves:
    """Running sums of the paper's clustering error, one number per layer and number of kept heads.

    Squared distances and a choice that is never taken back, so that one run gives the error for every k;
    the op's own choice (absolute distances, made twice) differs in detail.

    The sums are integers, so their order does not matter: a resumed calibration ends exactly where an
    uninterrupted one does. Memory is L·G numbers, whatever the text.

    Args:
        num_layers: L.
        num_kv_heads: G.
        num_query_heads: H.
        probe_tokens: P, tokens per window.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, num_query_heads: int, probe_tokens: int) -> None:
        self.sums: NDArray[np.int64] = np.zeros((num_layers, num_kv_heads), dtype=np.int64)
        self.windows = 0
        self._values_per_window = num_query_heads * probe_tokens

    def add(self, features: Sequence[NDArray[np.float32]]) -> None:
        """Add a batch of windows.

        Args:
            features: per layer the probe probabilities, float32 [B, H, P, P].
        """
        groups = self.sums.shape[1]
        for layer, batch in enumerate(features):
            for probabilities in batch:
                # The greedy choice is nested: its first k heads are the choice for k, so one run gives all k.
                _, errors = greedy_order(squared_distances(quantise(probabilities)), groups, groups)
                self.sums[layer] += np.asarray(errors, dtype=np.int64)
        self.windows += len(features[0])

    def normalised(self) -> tuple[tuple[float, ...], ...]:
        """[L][G]: squared distance to the representative, per query head, probe token and window.

        In units of probability squared, so that layers can be compared; never rising along a curve.
        """
        unit = QUANTISATION_STEPS**2 * self._values_per_window * max(self.windows, 1)
        return tuple(tuple(int(value) / unit for value in row) for row in self.sums)
