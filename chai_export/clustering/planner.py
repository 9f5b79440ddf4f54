"""Plans: which heads each layer keeps and in how many bits, chosen by measured loss (docs/plan.md).

The text is cut in three: on one part the damage of every option is measured, on the second some whole plans
are run to learn how their truth compares with the sum of their layers, on the third the chosen plan is
checked. Nothing is chosen by the third.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chai_export.arguments import as_real, shown
from chai_export.clustering.allocation import Choice, Frontier
from chai_export.clustering.correction import Correction
from chai_export.clustering.equaliser import Equalisers, equaliser
from chai_export.clustering.plan import Check, LayerPlan, Loss, Measurement, Plan, WholePlan
from chai_export.clustering.plan_check import check_key, check_of
from chai_export.clustering.plan_state import PlanState
from chai_export.clustering.plan_tradeoff import best_choices, damage_sum, option_table, storage_of
from chai_export.errors import ChaiError, UsageError
from chai_export.models.text import Text, as_list, read_tokens, require_in_vocabulary
from chai_export.models.windows import spread_windows
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.op.kv_sharing import for_each_layer
from chai_export.op.precision import GROUPS, Precision
from chai_export.progress import note, track
from chai_export.version import CREATED_WITH

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from chai_export.models.geometry import Geometry
    from chai_export.models.option_damage import Options
    from chai_export.models.whole_plan import Distance

DEFAULT_LOSS = 0.01
MOST_WINDOWS = 24
"""Windows that damage is measured on unless the user says otherwise."""
WHOLE_WINDOWS, CHECK_WINDOWS = 8, 16
"""Windows that whole plans are run on, and that the chosen one is checked on; twice as long as the others."""
_PASSES = 4
_FEWEST_WINDOWS = 6
_PRECISE_ENOUGH = 0.08
"""Relative standard error of a plan's sum of damage at which no more windows are measured."""
_RUNGS = (0.001, 0.005, 0.025, 0.12)
"""Sums of damage, in nats, of the whole plans that are run: over the losses that people ask for."""
_BITS = (16, 8, 4)
_PEAK_WINDOWS = 4
_PEAK_DIGITS, _DAMAGE_DIGITS = 4, 6
_MOST_KEPT = 16
"""Kept numbers that are tried in a layer."""


@dataclass(frozen=True)
class Rule:
    """What a plan is asked for: a bound on loss or on bytes, one of them.

    Attributes:
        loss: perplexity may rise by this share.
        bytes: share of what all heads take in float16.
    """

    loss: float | None = None
    bytes: float | None = None

    @staticmethod
    def asked(loss: float | None, bytes_share: float | None) -> Rule:
        """A rule of what a caller gives; the default one where he gives neither.

        Raises:
            UsageError: both are given, or one is out of range.
        """
        if loss is not None and bytes_share is not None:
            raise UsageError("--loss and --bytes are both given; give one of them")
        if bytes_share is not None:
            share = as_real(bytes_share)
            if share is None or not 0 < share <= 1:
                raise UsageError(
                    f"--bytes is {shown(bytes_share)}; give the share of float16's cache, more than 0 and at "
                    "most 1, such as 0.4"
                )
            return Rule(bytes=share)
        bound = as_real(DEFAULT_LOSS if loss is None else loss)
        if bound is None or not 0 < bound <= 1:
            raise UsageError(
                f"--loss is {shown(loss)}; give the share that perplexity may rise by, more than 0 and "
                "at most 1, such as 0.01"
            )
        return Rule(loss=bound)

    def __str__(self) -> str:
        return f"loss {self.loss:g}" if self.bytes is None else f"bytes {self.bytes:g}"


@dataclass(frozen=True)
class Windows:
    """Sequences of the three parts of the text, int32 [n, T]; ``skip``: positions that nothing predicts."""

    damage: NDArray[np.int32]
    whole: NDArray[np.int32]
    check: NDArray[np.int32]
    skip: int


def plan_cache(
    model: PreTrainedModel,
    geometry: Geometry,
    windows: Windows,
    rule: Rule,
    *,
    name: str,
    probe_tokens: int,
    known: Plan | None = None,
    force: bool = False,
    state: PlanState | None = None,
) -> Plan:
    """The smallest cache that keeps a bound on loss, or the least loss within a bound on bytes; checked.

    Args:
        model: a supported decoder in float32.
        geometry: of the model.
        windows: what to measure, correct and check on.
        rule: the bound.
        name: of the model, for the file.
        probe_tokens: P.
        known: a plan of this model whose measurements are used instead of new ones.
        force: return a plan that breaks its promise, marked, instead of raising.
        state: where measurements are kept, so that an interrupted run goes on from there.

    Raises:
        BrokenPromiseError: on text that nothing was chosen by, the plan costs more than the rule allows.
        ChaiError: the rule is out of reach.
    """
    from chai_export.models.key_peaks import key_peaks

    state = state or PlanState.nowhere()
    if known is not None:
        peaks, measured = known.key_peaks, _known_measurement(known)
        group = known.group or GROUPS[0]
    else:
        options, group = _options(geometry)
        found = state.peaks or key_peaks(model, windows.damage[:_PEAK_WINDOWS]).tolist()
        peaks = tuple(
            tuple(tuple(_rounded(p, _PEAK_DIGITS) for p in head) for head in layer) for layer in found
        )
        state.keep(peaks=peaks)
        measured = None
    planner = _Planner(model, geometry, group, peaks, probe_tokens, windows.skip)
    if measured is None:
        measured = planner.measure(options, windows, rule, state)
    frontier = planner.frontier(measured)
    correction = Correction(measured.whole_plans)
    choice = _chosen(rule, frontier, correction, windows.check.size, planner.float16_bytes)
    every_head = planner.share_with_every_head(measured, rule, damage_sum(measured, choice))
    layers = planner.layers(measured, choice)
    kl = correction.kl(damage_sum(measured, choice))
    expected = Loss(perplexity_ratio=math.exp(correction.nll_change(kl)), kl=kl)
    key = check_key(
        model, windows.check, layers, group=group, peaks=peaks, probe_tokens=probe_tokens, skip=windows.skip
    )
    checks = {} if known is None else known.checks
    if key in checks:
        note("this plan was checked on this text before; it is not run again")
    else:
        checks = {**checks, key: check_of(planner.run([layers], windows.check, "checking the plan")[0])}
    checked = checks[key]
    sources = geometry.kv_source_layers
    broken = rule.loss is not None and checked.perplexity_ratio > 1 + rule.loss
    plan = Plan(
        layers=layers,
        group=group,
        rule=str(rule),
        model=name,
        num_query_heads=geometry.num_query_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        value_head_dim=geometry.value_head_dim,
        kv_source_layers=None if sources is None else tuple(sources),
        probe_tokens=probe_tokens,
        expected=expected,
        checked=checked,
        forced=broken,
        kv_bytes_share=planner.bytes_of(layers) / planner.float16_bytes,
        kv_bytes_share_every_head=every_head,
        key_peaks=peaks,
        measured=measured,
        checks=checks,
        created_with=CREATED_WITH,
    )
    if broken and not force:
        raise BrokenPromiseError(rule, checked)
    state.remove()
    return plan


class BrokenPromiseError(ChaiError):
    """A plan costs more on held-out text than it was to."""

    def __init__(self, rule: Rule, checked: Check) -> None:
        super().__init__(
            f"on {checked.tokens} tokens of held-out text the plan raises perplexity by "
            f"{checked.perplexity_ratio - 1:.2%} ± {checked.perplexity_error:.2%}, more than the "
            f"{rule.loss:.2%} asked for; give more --text, ask for less, or write it with --force"
        )


class _Planner:
    """What all steps need of the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        geometry: Geometry,
        group: int,
        peaks: Sequence[Sequence[Sequence[float]]],
        probe_tokens: int,
        skip: int,
    ) -> None:
        self._model = model
        self._geometry = geometry
        self._group = group
        self._equalisers: Equalisers = {layer: equaliser(found) for layer, found in enumerate(peaks)}
        self._probe_tokens = probe_tokens
        self._skip = skip

    @property
    def float16_bytes(self) -> int:
        """Bytes of a token with all heads in float16."""
        exact = CacheStorage.exact(self._geometry, Dtype.FLOAT16)
        return exact.token_bytes(self._geometry.all_kept).total

    def bytes_of(self, layers: Sequence[LayerPlan]) -> int:
        """Bytes of a token."""
        return self._storage(layers).token_bytes([layer.kept_heads for layer in layers]).total

    def layers(self, measured: Measurement, choice: Choice) -> tuple[LayerPlan, ...]:
        """What a choice means for each layer."""
        table = option_table(measured)
        of_caches = [table[option] for option in choice]
        return tuple(for_each_layer(of_caches, self._geometry.kv_source_layers, self._geometry.num_layers))

    def frontier(self, measured: Measurement) -> Frontier:
        """All best choices."""
        return best_choices(measured, self._geometry, self._group)

    def share_with_every_head(self, measured: Measurement, rule: Rule, kl_sum: float) -> float | None:
        """Bytes over float16's of the best choice that keeps every head and does no more damage."""
        if rule.bytes is not None:
            return None
        frontier = best_choices(measured, self._geometry, self._group, every_head=True)
        try:
            return frontier.bytes_of(frontier.within_damage(kl_sum)) / self.float16_bytes
        except ValueError:
            return None

    def measure(self, options: Options, windows: Windows, rule: Rule, state: PlanState) -> Measurement:
        """Damage of every option, then the truth of some whole plans."""
        del rule
        by_window = list(state.damage)
        cut = windows.damage
        for number in track(
            range(len(by_window), len(cut)), "measuring damage", total=len(cut) - len(by_window)
        ):
            if self._precise(by_window, options, cut.shape[1]):
                break
            by_window.append(self._damage_of(cut[number], options, number))
            state.keep(damage=[window.tolist() for window in by_window])
        measured = _measurement(by_window, options, cut.shape[1])
        frontier = self.frontier(measured)
        rungs = list(dict.fromkeys(frontier.within_damage(limit) for limit in _RUNGS))
        plans = [self.layers(measured, choice) for choice in rungs]
        found = self.run(plans, windows.whole, "running whole plans")
        whole = tuple(
            WholePlan(
                kl_sum=_rounded(damage_sum(measured, choice), _DAMAGE_DIGITS),
                kl=_rounded(sums.mean_kl, _DAMAGE_DIGITS),
                nll_change=_rounded(sums.mean_nll_change, _DAMAGE_DIGITS),
                tokens=sums.total_tokens,
            )
            for choice, sums in zip(rungs, found, strict=True)
        )
        return measured.model_copy(update={"whole_plans": whole})

    def run(
        self, plans: Sequence[Sequence[LayerPlan]], windows: NDArray[np.int32], what: str
    ) -> list[Distance]:
        """How far whole plans are from the exact cache."""
        from chai_export.models.oracle import Oracle
        from chai_export.models.whole_plan import Distance, add_window

        pairs = [
            (
                Oracle(
                    self._model,
                    [layer.kept_heads for layer in layers],
                    self._probe_tokens,
                    storage=self._storage(layers),
                    equalisers={i: f for i, f in self._equalisers.items() if layers[i].key_bits == 4},
                ),
                Distance(),
            )
            for layers in plans
        ]
        for window in track(windows, what, total=len(windows)):
            add_window(self._model, window, pairs, skip=self._skip)
        return [sums for _, sums in pairs]

    def _damage_of(self, window: NDArray[np.int32], options: Options, seed: int) -> NDArray[np.float64]:
        from chai_export.models.option_damage import option_damage

        return option_damage(
            self._model,
            window,
            options,
            probe_tokens=self._probe_tokens,
            equalisers=self._equalisers,
            sources=self._geometry.kv_source_layers,
            passes=_PASSES,
            seed=seed,
        )

    def _precise(self, by_window: Sequence[NDArray[np.float64]], options: Options, tokens: int) -> bool:
        """Whether the sum of damage is known well enough for each of the whole plans to be run."""
        if len(by_window) < _FEWEST_WINDOWS or len(by_window) % 2:
            return False
        measured = _measurement(by_window, options, tokens)
        frontier = self.frontier(measured)
        flat = np.stack(by_window).reshape(len(by_window), len(by_window[0]), -1)
        caches = np.arange(flat.shape[1])
        for limit in _RUNGS:
            sums = flat[:, caches, list(frontier.within_damage(limit))].sum(axis=1)
            error = np.std(sums, ddof=1) / math.sqrt(len(sums))
            if error > _PRECISE_ENOUGH * sums.mean():
                return False
        return True

    def _storage(self, layers: Sequence[LayerPlan]) -> CacheStorage:
        return storage_of(layers, self._geometry, self._group)


def text_windows(
    texts: Text | Iterable[Text] | None,
    check: Text | Iterable[Text] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    leading: Sequence[int],
    *,
    samples: int,
    seq_len: int,
    least: int,
    checked_only: bool = False,
) -> Windows:
    """The windows of a plan: damage from the first part of each text, whole plans from the next, the check
    from ``check`` or else the last part.

    Args:
        texts: files, texts or token ids; None where ``check`` is all that is needed.
        check: unseen text.
        model: whose vocabulary the tokens must be of.
        tokenizer: of the model.
        leading: special tokens that sequences start with.
        samples: windows for damage, at most.
        seq_len: their tokens; the others are twice as long, if the text is.
        least: tokens of the shortest window that says anything.
        checked_only: measurements are known.

    Raises:
        ChaiError: a text cannot be used or is too short.
    """
    parts: list[list[NDArray[np.int32]]] = [[], [], []]
    ends = (0.65, 0.8, 1.0) if check is None else (0.8, 1.0, 1.0)
    for text in as_list(texts) if texts is not None else ():
        tokens = read_tokens(text, tokenizer)
        require_in_vocabulary(tokens, model)
        start = 0
        for part, share in zip(parts, ends, strict=True):
            end = int(share * len(tokens))
            part.append(tokens[start:end])
            start = end
    if check is not None:
        unseen = read_tokens(check, tokenizer)
        require_in_vocabulary(unseen, model)
        parts[2] = [unseen]
    joined = [np.concatenate(part) if part else np.zeros(0, np.int32) for part in parts]
    none = np.zeros((0, seq_len), np.int32)
    given = (
        none if checked_only else _cut(joined[0], leading, samples, seq_len, least, "measured"),
        none if checked_only else _cut(joined[1], leading, WHOLE_WINDOWS, 2 * seq_len, least, "corrected"),
        _cut(joined[2], leading, CHECK_WINDOWS, 2 * seq_len, least, "checked"),
    )
    return Windows(*given, skip=max(0, len(leading) - 1))


def _cut(
    tokens: NDArray[np.int32], leading: Sequence[int], count: int, length: int, least: int, what: str
) -> NDArray[np.int32]:
    """Windows of a part of the text, shorter ones if it is short."""
    length = min(length, len(tokens) + len(leading))
    if length < max(least, len(leading) + 2):
        raise ChaiError(
            f"the part of the text on which plans are {what} has {len(tokens)} tokens, {least} are "
            "the least; give more text"
        )
    return spread_windows(tokens, leading, count, length)


def _options(geometry: Geometry) -> tuple[Options, int]:
    """What is tried in each layer, and the elements that share a scale."""
    from chai_export.models.option_damage import Options

    keys, values = (
        _BITS if width % GROUPS[-1] == 0 else (_BITS[0],)
        for width in (geometry.head_dim, geometry.value_head_dim)
    )
    lowest = Precision(keys[-1], values[-1])
    group = GROUPS[0] if len(keys) == len(values) == 1 else lowest.group(geometry)
    heads = geometry.num_kv_heads
    kept = sorted({*np.linspace(1, heads, min(heads, _MOST_KEPT)).round().astype(int).tolist()}, reverse=True)
    return Options(tuple(kept), keys, values, group), group


def _chosen(
    rule: Rule, frontier: Frontier, correction: Correction, check_tokens: int, float16_bytes: int
) -> Choice:
    if rule.bytes is not None:
        try:
            return frontier.within_bytes(rule.bytes * float16_bytes)
        except ValueError:
            least = math.ceil(1000 * frontier.least_bytes / float16_bytes) / 1000
            raise ChaiError(
                f"--bytes {rule.bytes:g} is out of reach: one KV head and 4 bits in every layer take "
                f"{least:g} of float16's cache; give that or more"
            ) from None
    assert rule.loss is not None
    try:
        return frontier.within_damage(correction.sum_for(math.log1p(rule.loss), check_tokens))
    except ValueError:
        raise ChaiError(
            f"--loss {rule.loss:g} is out of reach: all heads in 16 bits may cost more; give more"
        ) from None


def _known_measurement(known: Plan) -> Measurement:
    if known.measured is None:
        raise ChaiError(f"{known.origin} has no measurements to reuse; calibrate without --from")
    return known.measured


def _measurement(by_window: Sequence[NDArray[np.float64]], options: Options, tokens: int) -> Measurement:
    """Means over windows, as they are written to the file."""
    mean = np.mean(by_window, axis=0) / tokens
    for axis in (1, 2, 3):  # less kept cannot do less damage; where chance says so, the larger number counts
        mean = np.maximum.accumulate(mean, axis=axis)
    return Measurement(
        kept_heads=options.kept_heads,
        key_bits=options.key_bits,
        value_bits=options.value_bits,
        damage=np.vectorize(lambda x: _rounded(x, _DAMAGE_DIGITS))(mean).tolist(),
        tokens=tokens * len(by_window),
        windows=len(by_window),
        whole_plans=(),
    )


def _peaks(found: Sequence[Sequence[Sequence[float]]]) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """As they are written to the file."""
    return tuple(tuple(tuple(_rounded(p, _PEAK_DIGITS) for p in head) for head in layer) for layer in found)


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
