"""From the sum of layers' damage to what a whole plan costs, and back.

Damage of layers does not quite add up, and large damage is not as the second-order measurement has it. A few
whole plans of growing damage are run, and what they really diverge by, over their sum, is interpolated
between them (on logarithms). Perplexity on real text rises by the divergence on average, if the model's
probabilities are right; how far that is so for this text is learnt from the same plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from chai_export.clustering.plan import WholePlan

CONFIDENCE = 1.3
"""Standard errors of the check that a plan stays below its bound by: nine checks of ten hold."""

_PRIOR_ERROR = 0.25
"""How far loss over divergence may be from 1, before any text was seen."""

_SUM_ERROR = 0.1
"""Relative error of a corrected sum, from what was seen on the demo model and SmolLM2-135M."""

_STEPS = 60


class Correction:
    """What whole plans taught; with none, sums are taken as they are.

    Args:
        whole_plans: plans that were run.
    """

    def __init__(self, whole_plans: Sequence[WholePlan]) -> None:
        seen = sorted((p for p in whole_plans if p.kl_sum > 0 and p.kl > 0), key=lambda p: p.kl_sum)
        self._sums = [math.log(p.kl_sum) for p in seen]
        self._ratios = [math.log(p.kl / p.kl_sum) for p in seen]
        self._kls = [math.log(p.kl) for p in seen]
        self._losses = [loss_over_divergence(p) for p in seen]

    def kl(self, kl_sum: float) -> float:
        """Divergence of a whole plan whose layers' damage adds up to ``kl_sum``, nats per token."""
        if kl_sum <= 0 or not self._sums:
            return kl_sum
        return kl_sum * math.exp(float(np.interp(math.log(kl_sum), self._sums, self._ratios)))

    def nll_change(self, kl: float) -> float:
        """Change of loss of a plan with that divergence, nats per token."""
        if kl <= 0 or not self._kls:
            return kl
        order = np.argsort(self._kls)
        return kl * float(np.interp(math.log(kl), np.array(self._kls)[order], np.array(self._losses)[order]))

    def sum_for(self, bound: float, check_tokens: int) -> float:
        """The largest sum of damage that a check of so many tokens will most likely find within a bound."""
        low, high = math.log(1e-12), math.log(10.0)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if self._highest(math.exp(middle), check_tokens) <= bound:
                low = middle
            else:
                high = middle
        return math.exp(low)

    def _highest(self, kl_sum: float, check_tokens: int) -> float:
        kl = self.kl(kl_sum)
        loss = self.nll_change(kl)
        sampling = 2 * kl / max(1, check_tokens)
        return loss + CONFIDENCE * math.sqrt(sampling + (_SUM_ERROR * loss) ** 2)


def loss_over_divergence(plan: WholePlan) -> float:
    """Change of loss over divergence: what was measured and 1, weighted by their precisions.

    A plan's change of loss scatters over tokens with a variance of twice its divergence.
    """
    error = math.sqrt(2 * plan.kl / plan.tokens) / plan.kl
    weights = 1 / _PRIOR_ERROR**2, 1 / error**2
    return (weights[0] + weights[1] * plan.nll_change / plan.kl) / sum(weights)
