"""The check of a plan on text that nothing was chosen by, and whether its outcome is known already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chai_export.clustering.plan import Check, LayerPlan
from chai_export.clustering.state import state_key
from chai_export.version import CREATED_WITH

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.models.whole_plan import Distance


def check_key(
    model: PreTrainedModel,
    windows: NDArray[np.int32],
    layers: Sequence[LayerPlan],
    *,
    group: int,
    peaks: Sequence[Sequence[Sequence[float]]],
    probe_tokens: int,
    skip: int,
) -> str:
    """Hash of all that a check depends on: the model with every weight, its text, the plan, this program.

    Measurements that come with ``--from`` are taken on trust, so that the check is what a promise stands on:
    one changed weight has to bring another.

    Args:
        model: that the plan is for.
        windows: int32 [n, T], what it is checked on.
        layers: the plan.
        group: elements that share a scale.
        peaks: [L][G][D], what keys are equalised by.
        probe_tokens: P.
        skip: positions in front whose predictions do not count.
    """
    settings = {
        "layers": [layer.model_dump() for layer in layers], "group": group, "peaks": peaks,
        "probe_tokens": probe_tokens, "skip": skip, "windows": windows.shape, "program": CREATED_WITH,
    }  # fmt: skip
    return state_key(model, windows, settings, every_value=True)


def check_of(sums: Distance) -> Check:
    """What a run of the plan found, as the file has it."""
    ratio = math.exp(sums.mean_nll_change)
    return Check(
        perplexity_ratio=ratio,
        kl=sums.mean_kl,
        tokens=sums.total_tokens,
        windows=len(sums.tokens),
        top1_agreement=sums.top1_agreement,
        perplexity_error=ratio * sums.nll_change_error,
    )
