"""The offline phase: a plan by measured loss (:mod:`chai_export.clustering.planner`), or the paper's (section
3.2): error curves from text, and from them R of each layer.

Online, a sequence's head map comes from its first P tokens. The curves must describe the same thing, so
a window here is the start of a sequence: the special tokens that the tokenizer puts in front, then text,
P tokens in all. Attention is causal, so nothing after them has to be fed; several windows are cut from
every sample, which makes little text go far.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, overload

from chai_export.arguments import path_of, whole
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.curves import ErrorCurves
from chai_export.clustering.keep import Budget, Elbow, parse_keep
from chai_export.clustering.measure import Measure
from chai_export.clustering.measured_budget import measure_damage, spend
from chai_export.clustering.plan import Plan
from chai_export.clustering.plan_state import PlanState
from chai_export.clustering.planner import MOST_WINDOWS, Rule, plan_cache, text_windows
from chai_export.clustering.state import load_state, remove_state, require_state_place, save_state, state_key
from chai_export.errors import UsageError
from chai_export.models.families import family_of
from chai_export.models.loading import load_model
from chai_export.models.text import Text, leading_special_tokens, read_tokens, require_in_vocabulary
from chai_export.models.tokenizer import load_tokenizer
from chai_export.models.windows import spread_windows, start_windows
from chai_export.op.probe import MEASURED_PROBE_TOKENS
from chai_export.progress import note, track
from chai_export.version import CREATED_WITH

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOWS_PER_SAMPLE = 8
_SAMPLES = 128
_SAMPLES_PER_SAVE = 8
_DAMAGE_SEQUENCES = 8
_PEAK_SEQUENCES = 4
"""Largest keys of channels are much the same from text to text."""
_PEAK_DIGITS = 4


class _Common(TypedDict):
    seq_len: int
    state: str | Path | None
    probe_tokens: int
    tokenizer: PreTrainedTokenizerBase | None
    trust_remote_code: bool


@overload
def calibrate(
    model: str | Path | PreTrainedModel,
    texts: Text | Iterable[Text] | None,
    *,
    keep: str,
    samples: int | None = None,
    seq_len: int = 256,
    state: str | Path | None = None,
    probe_tokens: int = MEASURED_PROBE_TOKENS,
    measure: Measure | str = Measure.ERROR,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Clusters: ...


@overload
def calibrate(
    model: str | Path | PreTrainedModel,
    texts: Text | Iterable[Text] | None,
    *,
    keep: str | None,
    loss: float | None,
    bytes_share: float | None,
    check: Text | Iterable[Text] | None,
    force: bool,
    known: Plan | str | Path | None = None,
    samples: int | None = None,
    seq_len: int = 256,
    state: str | Path | None = None,
    probe_tokens: int = MEASURED_PROBE_TOKENS,
    measure: Measure | str = Measure.ERROR,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Clusters | Plan: ...


@overload
def calibrate(
    model: str | Path | PreTrainedModel,
    texts: Text | Iterable[Text] | None,
    *,
    keep: None = None,
    loss: float | None = None,
    bytes_share: float | None = None,
    check: Text | Iterable[Text] | None = None,
    known: Plan | str | Path | None = None,
    force: bool = False,
    samples: int | None = None,
    seq_len: int = 256,
    state: str | Path | None = None,
    probe_tokens: int = MEASURED_PROBE_TOKENS,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Plan: ...


def calibrate(
    model: str | Path | PreTrainedModel,
    texts: Text | Iterable[Text] | None,
    *,
    keep: str | None = None,
    loss: float | None = None,
    bytes_share: float | None = None,
    check: Text | Iterable[Text] | None = None,
    known: Plan | str | Path | None = None,
    force: bool = False,
    samples: int | None = None,
    seq_len: int = 256,
    state: str | Path | None = None,
    probe_tokens: int = MEASURED_PROBE_TOKENS,
    measure: Measure | str = Measure.ERROR,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Clusters | Plan:
    """Choose what each layer's cache keeps: a plan of heads and precision by measured loss, or heads alone.

    Without any rule the plan is one for a loss of at most 1 %.

    Args:
        model: a directory, a hub id or a loaded model.
        texts: files (Path, or a str naming one), texts, or lists of token ids; one or several. None where
            ``known`` and ``check`` are all that is needed.
        keep: a rule for heads alone, see :mod:`chai_export.clustering.keep`; the result is then Clusters.
        loss: the share that perplexity may rise by on text that the choice did not see, such as 0.01: the
            smallest cache that keeps to it is planned.
        bytes_share: the share of float16's cache with all heads that a token may take, such as 0.4: the plan
            that loses least is chosen.
        check: the unseen text; unless given, a part of ``texts`` is held out.
        known: a plan of the same model, or its path, whose measurements are used instead of new ones.
        force: return a plan that breaks its promise, marked, instead of raising.
        samples: pieces of text to use at most, spread evenly over it: of a plan 24 windows for damage, of
            ``keep`` 128 pieces.
        seq_len: tokens per piece. For ``keep`` 8 windows of ``probe_tokens`` tokens are cut from each; whole
            plans are run on windows twice as long.
        state: file in which progress is kept, so that an interrupted calibration goes on from there with
            exactly the same result; removed at the end. No other file may be in its place.
        probe_tokens: P, the length of the online probe to calibrate for; exports of the result run with it.
        measure: what a budget minimises: "error", the error curves, or "kl", the divergence that each layer
            alone causes (:mod:`chai_export.clustering.measured_budget`; slower, much better beyond the
            elbows).
        tokenizer: instead of the one that comes with the model.
        trust_remote_code: run code that the model brings along.

    Returns:
        A plan, or the numbers of heads with the curves that decided them.

    Raises:
        BrokenPromiseError: the plan costs more on unseen text than ``loss``.
        ChaiError: the model or a text cannot be used, a text is empty or shorter than a sample, the rule
            cannot be met.
        UsageError: a setting makes no sense.
    """
    whole(seq_len, "--seq-len")
    whole(probe_tokens, "--probe-tokens")
    if samples is not None:
        whole(samples, "--samples")
    if seq_len < probe_tokens:
        raise UsageError(f"--seq-len {seq_len} is shorter than the probe of {probe_tokens} tokens; raise it")
    measure = Measure(measure)
    if state is not None:
        require_state_place(path_of(state, "state"))
    common: _Common = {
        "seq_len": seq_len, "state": state, "probe_tokens": probe_tokens, "tokenizer": tokenizer,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if keep is None:
        rule = Rule.asked(loss, bytes_share)
        if measure is Measure.KL:
            raise UsageError("--measure kl needs a budget to spend; use --keep budget:SHARE")
        return _plan(model, texts, rule, check, known, force=force, samples=samples or MOST_WINDOWS, **common)
    given = {
        "--loss": loss,
        "--bytes": bytes_share,
        "--from": known,
        "--check": check,
        "--force": force or None,
    }
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--keep {keep} and {name} exclude each other; --keep chooses heads alone")
    if texts is None:
        raise UsageError("--keep needs --text FILE to measure on")
    return _clusters(model, texts, keep, measure=measure, samples=samples or _SAMPLES, **common)


def _plan(
    model: str | Path | PreTrainedModel,
    texts: Text | Iterable[Text] | None,
    rule: Rule,
    check: Text | Iterable[Text] | None,
    known: Plan | str | Path | None,
    *,
    force: bool,
    samples: int,
    seq_len: int,
    state: str | Path | None,
    probe_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Plan:
    from chai_export.models.kv_sources import describe_model
    from chai_export.models.oracle import require_same_with_all_heads

    earlier = known if known is None or isinstance(known, Plan) else Plan.load(known)
    if texts is None and (earlier is None or check is None):
        raise UsageError("calibrate needs --text FILE; only --from PLAN with --check FILE does without")
    probe_tokens = (earlier and earlier.probe_tokens) or probe_tokens
    if seq_len <= probe_tokens:
        raise UsageError(
            f"--seq-len {seq_len} leaves nothing after the probe of {probe_tokens} tokens; raise it"
        )
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    geometry = describe_model(loaded)
    if earlier is not None:
        earlier.check(geometry)
    elif not family_of(geometry.model_type).tested:
        require_same_with_all_heads(loaded)
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    leading = leading_special_tokens(tokenizer)
    windows = text_windows(
        texts, check, loaded, tokenizer, leading[: seq_len - 1], samples=samples, seq_len=seq_len,
        least=probe_tokens + 1, checked_only=earlier is not None,
    )  # fmt: skip
    kept = PlanState.of(
        None if state is None or earlier is not None else Path(state), loaded, windows.damage,
        {"plan": 1, "probe_tokens": probe_tokens},
    )  # fmt: skip
    return plan_cache(
        loaded, geometry, windows, rule, name=_name_of(model), probe_tokens=probe_tokens, known=earlier,
        force=force, state=kept,
    )  # fmt: skip


def _clusters(
    model: str | Path | PreTrainedModel,
    texts: Text | Iterable[Text],
    keep: str,
    *,
    measure: Measure,
    samples: int,
    seq_len: int,
    state: str | Path | None,
    probe_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> Clusters:
    from chai_export.models.key_peaks import key_peaks
    from chai_export.models.kv_sources import describe_model
    from chai_export.models.oracle import probe_features, require_same_with_all_heads

    rule = parse_keep(keep)
    if measure is Measure.KL and not isinstance(rule, Budget):
        raise UsageError(f"--measure kl needs a budget to spend, not --keep {keep}; use --keep budget:SHARE")
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    geometry = describe_model(loaded)
    rule.check(geometry)
    if geometry.num_kv_heads == 1:
        note(
            "calibrate: one KV head per layer (multi-query attention): nothing to share, each layer keeps it"
        )
    if not family_of(geometry.model_type).tested:
        require_same_with_all_heads(loaded)
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    tokens = read_tokens(texts, tokenizer)
    leading = leading_special_tokens(tokenizer)
    require_in_vocabulary(tokens, loaded)
    cut = start_windows(tokens, leading, samples, seq_len, WINDOWS_PER_SAMPLE, probe_tokens)

    curves = ErrorCurves(geometry.num_layers, geometry.num_kv_heads, geometry.num_query_heads, probe_tokens)
    progress = _Progress(state, state_key(loaded, cut, {"probe_tokens": probe_tokens}), curves)
    for index in track(range(progress.done, len(cut)), "calibrating", total=len(cut) - progress.done):
        curves.add(probe_features(loaded, cut[index].tolist(), probe_tokens))
        progress.after(index + 1)

    error_curves = curves.normalised()
    damage: tuple[tuple[float, ...], ...] = ()
    if measure is Measure.KL and isinstance(rule, Budget):
        sequences = spread_windows(tokens, leading[: seq_len - 1], _DAMAGE_SEQUENCES, seq_len)
        damage = measure_damage(
            loaded, sequences, error_curves, probe_tokens=probe_tokens, sources=geometry.kv_source_layers
        )
        kept = spend(rule, damage, error_curves, geometry)
    else:
        kept = rule.choose(error_curves, geometry)
    if isinstance(rule, Elbow) and set(kept) == {geometry.num_kv_heads} and geometry.num_kv_heads > 1:
        note("calibrate: no redundant heads found: heads will not shrink this model's cache")
    peaks = key_peaks(loaded, spread_windows(tokens, leading[: seq_len - 1], _PEAK_SEQUENCES, seq_len))
    progress.finish()

    return Clusters(
        kept_heads=kept,
        model=_name_of(model),
        num_layers=geometry.num_layers,
        num_query_heads=geometry.num_query_heads,
        num_kv_heads=geometry.num_kv_heads,
        probe_tokens=probe_tokens,
        method=f"k-medoids on probe probabilities, keep {keep}{' by KL' if damage else ''}",
        error_curves=error_curves,
        kl_curves=damage,
        key_peaks=tuple(tuple(tuple(map(_rounded, head)) for head in layer) for layer in peaks.tolist()),
        kv_bytes_saved=geometry.kv_bytes_saved(kept),
        created_with=CREATED_WITH,
    )


class _Progress:
    """Keeps the sums on disk every few samples."""

    def __init__(self, path: str | Path | None, key: str, curves: ErrorCurves) -> None:
        self._path = None if path is None else Path(path)
        self._key = key
        self._curves = curves
        self.done = 0 if self._path is None else load_state(self._path, key, curves)

    def after(self, samples_done: int) -> None:
        """Note that so many samples are in the sums."""
        if self._path is not None and samples_done % _SAMPLES_PER_SAVE == 0:
            save_state(self._path, self._key, self._curves, samples_done)

    def finish(self) -> None:
        """Nothing is left to resume."""
        if self._path is not None:
            remove_state(self._path)


def _rounded(peak: float) -> float:
    return float(f"{peak:.{_PEAK_DIGITS}g}")


def _tokenizer_of(model: str | Path | PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model; None when there is none."""

    if isinstance(model, (str, Path)):
        return load_tokenizer(model)
    source = str(model.config.name_or_path)
    return load_tokenizer(source) if source and Path(source).is_dir() else None


def _name_of(model: str | Path | PreTrainedModel) -> str:
    """A name without the folders of this machine."""
    source = str(model) if isinstance(model, (str, Path)) else str(model.config.name_or_path)
    if source and Path(source).is_dir():
        return Path(source).resolve().name
    return source if source or isinstance(model, (str, Path)) else str(model.config.model_type)
