"""How far the predictions of whole plans are from those of the exact cache, window by window, in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chai_export.models.logits import row_parts
from chai_export.models.oracle import Oracle, model_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Distance:
    """Sums over the windows that were added: nats and tokens.

    Attributes:
        tokens: predicted tokens by window.
        kl: KL(exact || plan), by window.
        nll_change: loss of the plan less that of the exact cache, by window.
        agreed: positions with the same most probable token.
    """

    tokens: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    nll_change: list[float] = field(default_factory=list)
    agreed: int = 0

    @property
    def total_tokens(self) -> int:
        """Of all windows."""
        return sum(self.tokens)

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return max(0.0, sum(self.kl) / self.total_tokens)

    @property
    def mean_nll_change(self) -> float:
        """Nats per token."""
        return sum(self.nll_change) / self.total_tokens

    @property
    def nll_change_error(self) -> float:
        """Standard error of the mean change of loss: from its spread over windows, but no less than what the
        divergence lets expect, since few windows may agree by chance."""
        expected = math.sqrt(2 * self.mean_kl / self.total_tokens)
        if len(self.tokens) < 2:
            return expected
        means = np.array(self.nll_change) / np.array(self.tokens)
        return max(expected, float(np.std(means, ddof=1) / math.sqrt(len(means))))

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same most probable token."""
        return self.agreed / self.total_tokens


def add_window(
    model: PreTrainedModel,
    window: NDArray[np.int32],
    plans: Sequence[tuple[Oracle, Distance]],
    *,
    skip: int,
) -> None:
    """Run the exact model and every plan on a window, and add what they differ by.

    Args:
        model: what the oracles are of.
        window: int32 [T], a sequence.
        plans: oracles of ``model`` with the sums to add to.
        skip: positions in front whose predictions do not count.
    """
    exact = model_logits(model, window)[skip:-1]
    for oracle, sums in plans:
        add_logits(exact, oracle.logits(window)[skip:-1], window[skip + 1 :], sums)


def add_logits(
    exact: NDArray[np.float32], found: NDArray[np.float32], targets: NDArray[np.int32], sums: Distance
) -> None:
    """Add what two sets of logits for one window differ by.

    Args:
        exact: float32 [t, V], of the exact cache.
        found: float32 [t, V], of another.
        targets: int32 [t], the tokens that follow.
        sums: to add to.
    """
    wanted = torch.from_numpy(targets).long()
    pair = torch.from_numpy(exact), torch.from_numpy(found)
    parts = [_compared(pair[0][part], pair[1][part], wanted[part]) for part in row_parts(len(targets))]
    sums.tokens.append(len(targets))
    sums.kl.append(sum(kl for kl, _, _ in parts))
    sums.nll_change.append(sum(change for _, change, _ in parts))
    sums.agreed += sum(agreed for _, _, agreed in parts)


def _compared(exact: Tensor, found: Tensor, targets: Tensor) -> tuple[float, float, int]:
    """Sums of divergence, change of loss and agreement over some rows of logits [t, V]."""
    log_p, log_q = (torch.log_softmax(logits, dim=-1) for logits in (exact, found))
    difference = log_p - log_q
    of_targets = difference.gather(1, targets[:, None])
    agreed = (exact.argmax(dim=-1) == found.argmax(dim=-1)).sum()
    kl = (log_p.exp_().mul_(difference)).sum(dim=-1)
    return float(kl.double().sum()), float(of_targets.double().sum()), int(agreed)
