"""Static membership (the paper's CHAI-static): one head map per layer, decided once from calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chai_export.op.head_map import cluster_heads, distances, quantise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def static_head_maps(
    model: PreTrainedModel, windows: NDArray[np.int32], kept_heads: Sequence[int]
) -> NDArray[np.int32]:
    """The op's rule on distances summed over many windows, so that one map serves all sequences.

    Args:
        model: a supported decoder.
        windows: int32 [N, t], N starts of sequences. Nothing limits t to the online probe: more tokens
            describe a head better.
        kept_heads: R of each layer.

    Returns:
        int32 [L, H], query head to representative query head.
    """
    from chai_export.models.geometry import describe
    from chai_export.models.oracle import probe_features

    groups = describe(model.config).num_kv_heads
    sums: list[NDArray[np.int64]] = []
    for window in windows:
        features = probe_features(model, [window.tolist()], windows.shape[1])
        per_layer = [distances(quantise(layer[0])) for layer in features]
        sums = [a + b for a, b in zip(sums, per_layer, strict=True)] if sums else per_layer
    return np.stack(
        [cluster_heads(total, groups, kept) for total, kept in zip(sums, kept_heads, strict=True)]
    )
