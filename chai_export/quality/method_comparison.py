"""Clustering methods side by side at equal K-cache bytes, in torch, on the user's own model and text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.keep import Budget, KeepRule, Numbers, parse_keep
from chai_export.clustering.measured_budget import spend
from chai_export.clustering.static_maps import static_head_maps
from chai_export.errors import ChaiError, UsageError
from chai_export.models.geometry import Geometry
from chai_export.models.oracle import model_logits
from chai_export.models.text import Text
from chai_export.models.windows import spread_windows
from chai_export.op.probe import MEASURED_PROBE_TOKENS
from chai_export.progress import track
from chai_export.quality.clustered_run import fixed_maps, logits_with_maps, method_maps
from chai_export.quality.compared import compared
from chai_export.quality.divergence import Divergence
from chai_export.quality.methods import METHODS, Method, methods_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER_BUDGET = "budget:0.214"
_STATIC_WINDOWS, _STATIC_TOKENS = 32, 64


@dataclass(frozen=True)
class MethodResult:
    """One method at one probe length and one allocation of heads.

    Attributes:
        method: its name, see :data:`chai_export.quality.methods.METHODS`.
        keep: the rule that allocated the heads.
        probe_tokens: P.
        kept_heads: R of each layer, the same for every method under one rule.
        kv_bytes_saved: share of the KV cache.
        nll: loss in nats per token.
        nll_change: against all heads.
        nll_change_error: standard error of that, from its spread over windows.
        perplexity_change: relative, 0.01 is 1 %.
        kl: mean KL(all heads || method) in nats per token.
        top1_agreement: share of positions with the same most probable token.
        nll_change_by_window: the change in each sequence, in order, so that methods can be paired.
    """

    method: str
    keep: str
    probe_tokens: int
    kept_heads: tuple[int, ...]
    kv_bytes_saved: float
    nll: float
    nll_change: float
    nll_change_error: float
    perplexity_change: float
    kl: float
    top1_agreement: float
    nll_change_by_window: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Methods compared on one model and text.

    Attributes:
        model: its name.
        tokens: predicted tokens.
        windows: sequences; each starts afresh.
        seq_len: tokens per sequence.
        nll_all: loss with all heads, nats per token.
        results: one entry per rule, probe length and method.
    """

    model: str
    tokens: int
    windows: int
    seq_len: int
    nll_all: float
    results: tuple[MethodResult, ...]

    def to_json(self) -> dict[str, Any]:
        """As printed by ``compare --json``."""
        return {
            "model": self.model,
            "tokens": self.tokens,
            "windows": self.windows,
            "seq_len": self.seq_len,
            "all": {"nll": self.nll_all, "perplexity": math.exp(self.nll_all)},
            "results": [
                {
                    **asdict(row),
                    "kept_heads": list(row.kept_heads),
                    "nll_change_by_window": list(row.nll_change_by_window),
                }
                for row in self.results
            ],
        }


def compare(
    model: str | Path | PreTrainedModel,
    text: Text | Iterable[Text],
    *,
    calibration: Text | Iterable[Text] | None = None,
    clusters: Clusters | str | Path | None = None,
    keep: Sequence[str] = (PAPER_BUDGET,),
    methods: Sequence[str] | None = None,
    probe_tokens: Sequence[int] = (MEASURED_PROBE_TOKENS,),
    windows: int = 16,
    seq_len: int = 256,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Teacher-forced loss and divergence of clustering methods that all keep the same heads per layer.

    Args:
        model: a directory, a hub id or a loaded model.
        text: what to measure on.
        calibration: where the error curves and the maps of CHAI-static come from; without it the first
            half of ``text``, and only the second half is measured.
        clusters: take error curves from here instead of measuring them; where they hold measured
            divergences (``calibrate --measure kl``), budgets go by these.
        keep: rules of ``--keep``; each gives one allocation of heads.
        methods: names, all unless given.
        probe_tokens: probe lengths to try.
        windows: sequences, spread evenly over the text; fewer if it has fewer.
        seq_len: tokens per sequence.
        seed: for random maps and the starts of K-Means.
        tokenizer: instead of the one that comes with the model.
        trust_remote_code: run code that the model brings along.

    Raises:
        ChaiError: model or text cannot be used, or a rule cannot be met.
        UsageError: a setting makes no sense.
    """

    chosen = methods_named(list(METHODS) if methods is None else methods)
    _check_settings(probe_tokens, windows, seq_len)
    on = compared(model, text, calibration, tokenizer, trust_remote_code=trust_remote_code)
    loaded, geometry, known, leading = on.model, on.geometry, on.known, on.leading
    sequences = spread_windows(on.measured, leading, windows, seq_len)
    allocations = _allocations(loaded, geometry, clusters, known, on.tokenizer, keep, probe_tokens)
    setups = [
        _Setup(method, rule, kept, probe)
        for rule, kept in allocations
        for probe in probe_tokens
        for method in chosen
        if method.rule is not None or probe == probe_tokens[0]
    ]
    starts = spread_windows(known, leading, _STATIC_WINDOWS, min(_STATIC_TOKENS, seq_len))
    for setup in setups:
        if setup.method.rule is None:
            setup.static = static_head_maps(loaded, starts, setup.kept)
    for number, sequence in enumerate(track(sequences, "comparing", total=len(sequences))):
        every, targets = model_logits(loaded, sequence)[on.skip : -1], sequence[on.skip + 1 :]
        for setup in setups:
            shared = setup.logits(loaded, sequence, seed + number)[on.skip : -1]
            setup.add(every, shared, targets)
    return Comparison(
        model=on.name,
        tokens=setups[0].sums.tokens,
        windows=len(sequences),
        seq_len=seq_len,
        nll_all=setups[0].sums.nll_all,
        results=tuple(setup.result(geometry) for setup in setups),
    )


class _Setup:
    """One line of the table while it is being measured."""

    def __init__(self, method: Method, keep: str, kept: tuple[int, ...], probe: int) -> None:
        self.method = method
        self.keep = keep
        self.kept = kept
        self.probe = probe
        self.static: NDArray[np.int32] | None = None
        self.sums = Divergence()
        self._changes: list[float] = []

    def logits(self, model: PreTrainedModel, sequence: NDArray[np.int32], seed: int) -> NDArray[np.float32]:
        """Logits of one sequence under this method."""
        if self.static is not None:
            choose = fixed_maps(self.static)
        else:
            choose = method_maps(self.method, self.kept, self.probe, seed)
        return logits_with_maps(model, sequence, choose, self.probe if self.method.exact_probe else 0)

    def add(
        self, every: NDArray[np.float32], shared: NDArray[np.float32], targets: NDArray[np.int32]
    ) -> None:
        """Add the logits of one sequence."""
        before = (self.sums.nll_change_sum, self.sums.tokens)
        self.sums.add(every, shared, targets)
        tokens = self.sums.tokens - before[1]
        self._changes.append((self.sums.nll_change_sum - before[0]) / tokens)

    def result(self, geometry: Geometry) -> MethodResult:
        """The line."""
        return MethodResult(
            method=self.method.name,
            keep=self.keep,
            probe_tokens=self.probe,
            kept_heads=self.kept,
            kv_bytes_saved=geometry.kv_bytes_saved(self.kept),
            nll=self.sums.nll,
            nll_change=self.sums.nll - self.sums.nll_all,
            nll_change_error=_standard_error(self._changes),
            perplexity_change=self.sums.perplexity_change,
            kl=self.sums.kl,
            top1_agreement=self.sums.top1_agreement,
            nll_change_by_window=tuple(self._changes),
        )


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _allocations(
    model: PreTrainedModel,
    geometry: Geometry,
    clusters: Clusters | str | Path | None,
    known: NDArray[np.int32],
    tokenizer: PreTrainedTokenizerBase | None,
    keep: Sequence[str],
    probe_tokens: Sequence[int],
) -> list[tuple[str, tuple[int, ...]]]:
    """Each rule with the heads it keeps; rules are checked before anything slow happens."""
    rules = [(text, parse_keep(text)) for text in keep]
    for _, rule in rules:
        rule.check(geometry)
    if all(isinstance(rule, Numbers) for _, rule in rules):
        return [(text, rule.choose((), geometry)) for text, rule in rules]
    if clusters is None:
        measured = calibrate(
            model, known, keep="all", seq_len=min(256, len(known)), probe_tokens=min(probe_tokens),
            tokenizer=tokenizer,
        )  # fmt: skip
    else:
        measured = clusters if isinstance(clusters, Clusters) else Clusters.load(clusters)
        measured.check(geometry)
        if not measured.error_curves:
            raise ChaiError(f"{measured.origin} has no error curves; calibrate again or leave --clusters out")
    return [(text, _kept(rule, measured, geometry)) for text, rule in rules]


def _kept(rule: KeepRule, measured: Clusters, geometry: Geometry) -> tuple[int, ...]:
    """A budget goes by measured divergence where the clusters have it."""
    if isinstance(rule, Budget) and measured.kl_curves:
        return spend(rule, measured.kl_curves, measured.error_curves, geometry)
    return rule.choose(measured.error_curves, geometry)


def _check_settings(probe_tokens: Sequence[int], windows: int, seq_len: int) -> None:
    if not probe_tokens or min(probe_tokens) < 1:
        raise UsageError("--probe-tokens must be numbers of at least 1")
    if windows < 1:
        raise UsageError(f"--windows must be at least 1, not {windows}")
    if seq_len <= max(probe_tokens) + 1:
        raise UsageError(f"--seq-len {seq_len} leaves nothing to measure after the probe; raise it")
