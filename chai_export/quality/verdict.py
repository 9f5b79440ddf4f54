"""The verdict of `verify`: the worst of everything that was compared."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.models.logits import differences, total_kl
from chai_export.quality.boundaries import Boundary
from chai_export.quality.quantised_weights import WeightsChecked
from chai_export.quality.truth import Expected

LEAST_MAP_AGREEMENT = {"float32": 0.95, "float16": 0.0, "bfloat16": 0.0}
"""Head maps are integers of rounded probabilities: a correct engine may differ in single heads of a deep
model, a wrong one differs in most. In lower precision rounding alone moves many, so nothing is demanded."""


@dataclass(frozen=True)
class Gate:
    """One comparison of a bundle with the ONNX file it was made from, or of its graph with exact rows.

    Attributes:
        name: "exact", "as written" or "chai", for a Hugging Face model "exact rows"; docs/verification.md
            says what each compares.
        heads: "all" or "chai".
        max_abs_logit_diff: largest difference of a logit.
        tolerance_used: that in units of what is allowed at its position; right up to 1.
        tolerance: what is allowed at the position that is allowed most.
    """

    name: str
    heads: str
    max_abs_logit_diff: float
    tolerance_used: float
    tolerance: float


@dataclass(frozen=True)
class VerifyResult:
    """What was found; ``ok`` is the gate.

    Attributes:
        ok: differences within tolerance, greedy tokens the same and, in float32, the head maps too.
        max_abs_logit_diff: {"all": …, "chai": …}; None for "all" of a bundle with static membership.
        tolerance_used: {"all": …, "chai": …}: the difference in units of what is allowed at its position, at
            the position where that is largest; right up to 1.
        greedy_match: {"all": …, "chai": …}, likewise.
        distance_to_exact: {"all": {"max_abs_logit_diff", "kl"}, "chai": {…}}, how far the engine is from the
            model that caches its rows as they are computed: what the bits cost, no part of the gate. kl is
            KL(exact || engine) in nats, the mean over positions. None unless rows are cached in fewer bits.
        head_map_agreement: share of query heads with the same representative, 0 … 1.
        tolerance: logit difference allowed at the position that is allowed most.
        prompts: prompts compared.
        tokens: positions compared per way of running.
        greedy_ties: chosen tokens whose logit equals the reference's best within the tolerance; they count
            as a match.
        first_mismatch: {"all"|"chai": {"prompt", "token"}} where greedy tokens first differ.
        boundaries: lengths at which rotary embedding changes or a window begins to hide tokens, crossed or
            not, and why not.
        gates: the single comparisons where the reference is an ONNX file; for a Hugging Face model those of
            the graph with rows as they are computed, where the bundle stores them in fewer bits.
        not_compared: gates that were left out, and why.
        weights: the quantised weights beside the model's; None where they are floats, or the reference is a
            file. Activations are exact then in everything but ``distance_to_exact``.
    """

    ok: bool
    max_abs_logit_diff: dict[str, float | None]
    tolerance_used: dict[str, float | None]
    greedy_match: dict[str, bool | None]
    head_map_agreement: float
    tolerance: float
    prompts: int
    tokens: int
    greedy_ties: int
    first_mismatch: dict[str, dict[str, int]]
    boundaries: tuple[Boundary, ...] = ()
    distance_to_exact: dict[str, dict[str, float]] | None = None
    gates: tuple[Gate, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    weights: WeightsChecked | None = None

    def to_json(self) -> dict[str, Any]:
        """As printed by ``verify --json``."""
        return {
            "ok": self.ok,
            "max_abs_logit_diff": _finite(self.max_abs_logit_diff),
            "tolerance_used": _finite(self.tolerance_used),
            "distance_to_exact": None
            if self.distance_to_exact is None
            else {heads: _finite(figures) for heads, figures in self.distance_to_exact.items()},
            "greedy_match": self.greedy_match,
            "head_map_agreement": self.head_map_agreement,
            "tolerance": self.tolerance,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "greedy_ties": self.greedy_ties,
            "first_mismatch": self.first_mismatch,
            "boundaries": [asdict(boundary) for boundary in self.boundaries],
            "gates": [{k: _number(v) for k, v in asdict(gate).items()} for gate in self.gates],
            "not_compared": dict(self.not_compared),
            "weights": None if self.weights is None else asdict(self.weights),
        }


EXACT_ROWS = "exact rows"
"""The gate of a Hugging Face model where the bundle caches rows in fewer bits."""


class Verdict:
    """Collects the worst of everything.

    Args:
        compared: ways of running that are compared: "all", "chai" or both.
        least_agreement: share of query heads that must have the same representative.
        tolerance: logit difference allowed everywhere, instead of what each position is allowed.
        as_it_runs: what is compared is not the engine as it runs, whose distance is given by itself.
    """

    def __init__(
        self,
        compared: Sequence[str],
        least_agreement: float,
        tolerance: float | None = None,
        *,
        as_it_runs: bool = False,
    ) -> None:
        self._as_it_runs = as_it_runs
        self._fixed = tolerance
        self._least_agreement = least_agreement
        self._worst = dict.fromkeys(compared, 0.0)
        self._used = dict.fromkeys(compared, 0.0)
        self._largest = 0.0
        self._exact: dict[str, Gate] = {}
        self._distances: dict[str, list[NDArray[np.float64]]] = {}
        self._kl = dict.fromkeys(compared, 0.0)
        self._mismatch: dict[str, dict[str, int]] = {}
        self._same_heads: list[bool] = []
        self._ties = 0
        self._tokens = 0
        self._prompts: set[int] = set()

    def logits(self, heads: str, engine: NDArray[np.float32], expected: Expected) -> None:
        """Logits [T, V] of the engine."""
        allowed = self._allowed(expected)
        found = differences(engine, expected.logits)
        self._worst[heads] = max(self._worst[heads], float(found.max()))
        self._used[heads] = max(self._used[heads], float((found / allowed).max()))
        self._largest = max(self._largest, float(allowed.max()))
        if expected.exact is not None and not self._as_it_runs:
            self.distance(heads, engine, expected.exact)
        self._tokens += len(engine) if heads == "chai" else 0

    def exact_rows(self, heads: str, engine: NDArray[np.float32], expected: Expected) -> None:
        """Logits [T, V] of the engine's graph on rows that are cached as they are computed."""
        assert expected.exact is not None
        assert expected.exact_tolerances is not None
        allowed = self._allowed(Expected(expected.exact, expected.exact_tolerances))
        found = differences(engine, expected.exact)
        before = self._exact.get(heads, Gate(EXACT_ROWS, heads, 0.0, 0.0, 0.0))
        self._exact[heads] = Gate(
            EXACT_ROWS,
            heads,
            max(before.max_abs_logit_diff, float(found.max())),
            max(before.tolerance_used, float((found / allowed).max())),
            max(before.tolerance, float(allowed.max())),
        )

    def distance(self, heads: str, engine: NDArray[np.float32], exact: NDArray[np.float32]) -> None:
        """Logits [T, V] of the engine as it runs, and those of the model without its roundings."""
        self._distances.setdefault(heads, []).append(differences(engine, exact))
        self._kl[heads] += total_kl(exact, engine)

    def greedy(self, heads: str, prompt: int, chosen: Sequence[int], expected: Expected) -> None:
        """The tokens that the engine chose at the end of the sequence ``expected`` is for."""
        self._prompts.add(prompt)
        before = slice(len(expected.logits) - len(chosen) - 1, -1)
        rows, allowed = expected.logits[before], self._allowed(expected)[before]
        for place, token in enumerate(chosen):
            best = int(rows[place].argmax())
            if token == best:
                continue
            if rows[place][best] - rows[place][token] <= allowed[place]:
                self._ties += 1
            elif heads not in self._mismatch:
                self._mismatch[heads] = {"prompt": prompt, "token": place}

    def maps(self, engine: NDArray[np.int32], expected: NDArray[np.int32]) -> None:
        """Head maps of one sequence, [L, H] each."""
        self._same_heads.extend((engine == expected).ravel().tolist())

    def result(self) -> VerifyResult:
        """The verdict."""
        agreement = float(np.mean(self._same_heads))
        gates = tuple(self._exact.values())
        for gate in gates:
            self._used[gate.heads] = max(self._used[gate.heads], gate.tolerance_used)
        close = all(used <= 1.0 for used in self._used.values())
        return VerifyResult(
            ok=close and not self._mismatch and agreement >= self._least_agreement,
            max_abs_logit_diff={heads: self._worst.get(heads) for heads in ("all", "chai")},
            tolerance_used={heads: self._used.get(heads) for heads in ("all", "chai")},
            greedy_match={
                heads: heads not in self._mismatch if heads in self._worst else None
                for heads in ("all", "chai")
            },
            head_map_agreement=agreement,
            tolerance=self._largest,
            prompts=len(self._prompts),
            tokens=self._tokens,
            greedy_ties=self._ties,
            first_mismatch=self._mismatch,
            distance_to_exact=self._distance() if self._distances else None,
            gates=gates,
        )

    def _distance(self) -> dict[str, dict[str, float]]:
        result = {}
        for heads, parts in self._distances.items():
            found = np.concatenate(parts)
            result[heads] = {"max_abs_logit_diff": float(found.max()), "kl": self._kl[heads] / len(found)}
        return result

    def _allowed(self, expected: Expected) -> NDArray[np.float64]:
        return expected.tolerances if self._fixed is None else np.full(len(expected.logits), self._fixed)


def _finite(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has no infinity, which stands for logits that are not finite."""
    return {key: None if value is None else _number(value) for key, value in figures.items()}


def _number(value: Any) -> Any:
    return min(value, sys.float_info.max) if isinstance(value, float) else value
