"""The scoreboard: every method on a model and a text, beside the exact cache, in torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.keep import Budget
from chai_export.clustering.plan import Plan
from chai_export.clustering.static_maps import static_head_maps
from chai_export.errors import ChaiError, UsageError
from chai_export.models.attention import attention_of
from chai_export.models.kv_sources import describe_model
from chai_export.models.oracle import model_logits
from chai_export.models.text import Text, leading_special_tokens, read_tokens
from chai_export.models.whole_plan import Distance, add_logits
from chai_export.models.windows import spread_windows
from chai_export.op.probe import MEASURED_PROBE_TOKENS
from chai_export.progress import track
from chai_export.quality.compared import compared
from chai_export.quality.scoreboard.catalogue import SHARES, check_names, methods, names
from chai_export.quality.scoreboard.method import CacheMethod, float16_bytes
from chai_export.quality.scoreboard.observed import observe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OBSERVED_WINDOWS, _OBSERVED_TOKENS = 3, 512
_STATIC_WINDOWS, _STATIC_TOKENS = 32, 64
_CURVE_SAMPLES = 48


@dataclass(frozen=True)
class Row:
    """One method at one setting.

    Attributes:
        method: its name.
        setting: of the method.
        on_op: whether the op of this project runs it.
        bytes_share: of what all heads take in float16, at the end of a sequence.
        perplexity_change: relative to the exact cache, 0.01 is 1 %.
        perplexity_error: standard error of that.
        kl: mean KL(exact || method), nats per token.
        kl_by_quarter: the same in each quarter of a sequence.
        top1_agreement: share of positions with the same most probable token.
    """

    method: str
    setting: str
    on_op: bool
    bytes_share: float
    perplexity_change: float
    perplexity_error: float
    kl: float
    kl_by_quarter: tuple[float, ...]
    top1_agreement: float


@dataclass(frozen=True)
class AtEqualBytes:
    """A plan, and the best of the others that take no more bytes than it does; None where there is none.

    ``on_op``: of those that the op runs; ``any_method``: of all.
    """

    plan: Row
    on_op: Row | None
    any_method: Row | None


@dataclass(frozen=True)
class Scoreboard:
    """All methods on one model and text.

    Attributes:
        model: its name.
        tokens: predicted tokens.
        windows: sequences; each starts afresh.
        seq_len: tokens per sequence.
        rows: by method and setting.
        missing: methods and settings that this model has nothing for, and why.
    """

    model: str
    tokens: int
    windows: int
    seq_len: int
    rows: tuple[Row, ...]
    missing: dict[str, str] = field(default_factory=dict)

    def at_equal_bytes(self) -> list[AtEqualBytes]:
        """Every plan beside the best of the others, by divergence."""
        plans = sorted((row for row in self.rows if row.method == "plan"), key=lambda row: row.bytes_share)
        return [
            AtEqualBytes(plan, self._best(plan.bytes_share, True), self._best(plan.bytes_share, False))
            for plan in plans
        ]

    def _best(self, share: float, on_op: bool) -> Row | None:
        others = [
            row
            for row in self.rows
            if row.method != "plan" and row.bytes_share <= share and (row.on_op or not on_op)
        ]
        return min(others, key=lambda row: row.kl, default=None)

    def to_json(self) -> dict[str, Any]:
        """As printed by ``compare --json``."""
        return {
            "model": self.model,
            "tokens": self.tokens,
            "windows": self.windows,
            "seq_len": self.seq_len,
            "rows": [{**asdict(row), "kl_by_quarter": list(row.kl_by_quarter)} for row in self.rows],
            "at_equal_bytes": [
                {
                    name: None if row is None else {"method": row.method, "setting": row.setting}
                    for name, row in (("plan", each.plan), ("on_op", each.on_op), ("any", each.any_method))
                }
                for each in self.at_equal_bytes()
            ],
            "missing": self.missing,
        }


def scoreboard(
    model: str | Path | PreTrainedModel,
    text: Text | Iterable[Text],
    *,
    calibration: Text | Iterable[Text] | None = None,
    plan: Plan | str | Path | None = None,
    shares: Sequence[float] = SHARES,
    wanted: Sequence[str] | None = None,
    windows: int = 4,
    seq_len: int = 512,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Scoreboard:
    """Teacher-forced loss and divergence of every way to make the cache smaller that is known here.

    Args:
        model: a directory, a hub id or a loaded model.
        text: what to measure on.
        calibration: where plans, head counts, ranges and choices of heads come from; without it the first
            half of ``text``, and only the second half is measured.
        plan: whose measurements plans are made from; without it one is calibrated.
        shares: of float16's bytes, for plans and for methods that can be set to any.
        wanted: names of methods, all unless given.
        windows: sequences, spread evenly over the text; fewer if it has fewer.
        seq_len: tokens per sequence.
        tokenizer: instead of the one that comes with the model.
        trust_remote_code: run code that the model brings along.

    Raises:
        ChaiError: model, text or plan cannot be used.
        UsageError: a setting makes no sense.
    """
    if windows < 1:
        raise UsageError(f"--windows must be at least 1, not {windows}")
    if seq_len < 4 * MEASURED_PROBE_TOKENS:
        raise UsageError(f"--seq-len {seq_len} is too short; give {4 * MEASURED_PROBE_TOKENS} or more")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError("--bytes must be shares of float16's cache, more than 0 and at most 1, such as 0.4")
    chosen = names() if wanted is None else tuple(wanted)
    check_names(chosen)
    on = compared(model, text, calibration, tokenizer, trust_remote_code=trust_remote_code)
    loaded, geometry, known, leading = on.model, on.geometry, on.known, on.leading
    sequences = spread_windows(on.measured, leading, windows, seq_len)
    if plan is None:
        plan = calibrate(loaded, known, bytes_share=max(shares), force=True, tokenizer=on.tokenizer)
    elif not isinstance(plan, Plan):
        plan = Plan.load(plan)
    plan.check(geometry)
    observed = observe(
        loaded, geometry,
        spread_windows(known, leading, _OBSERVED_WINDOWS, min(_OBSERVED_TOKENS, len(known) + len(leading))),
        max(seq_len, _OBSERVED_TOKENS),
    )  # fmt: skip
    curves: list[Sequence[Sequence[float]]] = []

    def heads_for(saved: float) -> tuple[int, ...]:
        if not curves:
            curves.append(
                calibrate(
                    loaded, known, keep="all", samples=_CURVE_SAMPLES, seq_len=min(256, len(known)),
                    tokenizer=on.tokenizer,
                ).error_curves
            )  # fmt: skip
        return Budget(saved).choose(curves[0], geometry)

    def static_maps(kept: Sequence[int]) -> NDArray[np.int32]:
        starts = spread_windows(known, leading, _STATIC_WINDOWS, min(_STATIC_TOKENS, seq_len))
        return static_head_maps(loaded, starts, tuple(kept))

    found, missing = methods(
        chosen, plan, observed, geometry,
        shares=shares, tokens=seq_len, heads_for=heads_for, static_maps=static_maps,
        probe_tokens=MEASURED_PROBE_TOKENS,
    )  # fmt: skip
    if not found:
        raise ChaiError("; ".join(f"{name} is not for this model: {why}" for name, why in missing.items()))
    setups = [_Setup(method) for method in found]
    steps = [(sequence, setup) for sequence in sequences for setup in setups]
    exact: NDArray[np.float32] | None = None
    for sequence, setup in track(steps, "comparing", total=len(steps)):
        if setup is setups[0]:
            exact = model_logits(loaded, sequence)
        assert exact is not None
        setup.add(exact, _logits(loaded, sequence, setup.method), sequence, on.skip)
    return Scoreboard(
        model=on.name,
        tokens=setups[0].whole.total_tokens,
        windows=len(sequences),
        seq_len=seq_len,
        rows=tuple(setup.row(float16_bytes(geometry, seq_len), seq_len) for setup in setups),
        missing=missing,
    )


def greedy_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    prompts: Sequence[str],
    count: int,
    *,
    calibration: Text | Iterable[Text],
    share: float = 0.4,
) -> list[dict[str, Any]]:
    """What some methods write, the most probable token each time, by prefills of what there is so far.

    Args:
        model: a supported decoder in float32.
        tokenizer: of the model.
        plan: with measurements.
        prompts: texts to go on from.
        count: new tokens.
        calibration: what methods choose by.
        share: of float16's bytes, for methods that can be set to any.

    Returns:
        By prompt the text of the exact cache and of every method, by its name and setting.
    """
    geometry = describe_model(model)
    known, leading = read_tokens(calibration, tokenizer), leading_special_tokens(tokenizer)
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) + count
    windows = spread_windows(known, leading, 1, max(_OBSERVED_TOKENS, longest))
    found, _ = methods(
        ("plan", "bits", "kivi", "duo", "h2o", "squeeze"), plan,
        observe(model, geometry, windows, windows.shape[1]), geometry,
        shares=(share,), tokens=longest, heads_for=lambda saved: (),
        static_maps=lambda kept: np.zeros(0, np.int32), probe_tokens=MEASURED_PROBE_TOKENS,
    )  # fmt: skip
    results = []
    for prompt in track(list(prompts), "writing texts", total=len(prompts)):
        ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
        made: dict[str, str] = {}
        for method in (None, *found):
            tokens = list(ids)
            for _ in range(count):
                row = np.array(tokens, np.int32)
                logits = model_logits(model, row) if method is None else _logits(model, row, method)
                tokens.append(int(logits[-1].argmax()))
            name = "exact" if method is None else f"{method.name}, {method.setting}"
            made[name] = str(tokenizer.decode(tokens[len(ids) :]))
        results.append({"prompt": prompt, "texts": made})
    return results


def _logits(model: PreTrainedModel, sequence: NDArray[np.int32], method: CacheMethod) -> NDArray[np.float32]:
    with attention_of(model, method.attend), torch.inference_mode():
        found = model(input_ids=torch.from_numpy(sequence[None]).long(), use_cache=False).logits[0]
    logits: NDArray[np.float32] = found.float().numpy()
    return logits


class _Setup:
    """One line of the table while it is being measured."""

    def __init__(self, method: CacheMethod) -> None:
        self.method = method
        self.whole = Distance()
        self._quarters = [Distance() for _ in range(4)]

    def add(
        self,
        exact: NDArray[np.float32],
        found: NDArray[np.float32],
        sequence: NDArray[np.int32],
        skip: int,
    ) -> None:
        """Add the logits of one sequence."""
        add_logits(exact[skip:-1], found[skip:-1], sequence[skip + 1 :], self.whole)
        for quarter, rows in zip(
            self._quarters, np.array_split(np.arange(skip, len(sequence) - 1), 4), strict=True
        ):
            add_logits(exact[rows], found[rows], sequence[rows + 1], quarter)

    def row(self, float16: int, tokens: int) -> Row:
        """The line."""
        ratio = float(np.exp(self.whole.mean_nll_change))
        return Row(
            method=self.method.name,
            setting=self.method.setting,
            on_op=self.method.on_op,
            bytes_share=self.method.cache_bytes(tokens) / float16,
            perplexity_change=ratio - 1,
            perplexity_error=ratio * self.whole.nll_change_error,
            kl=self.whole.mean_kl,
            kl_by_quarter=tuple(quarter.mean_kl for quarter in self._quarters),
            top1_agreement=self.whole.top1_agreement,
        )
