"""The gate between a bundle and its use: does it compute what its model computes?

Four comparisons, each on a full sequence of a prompt and the tokens that the engine itself made for it:

all     logits of the engine with every head kept, against the Hugging Face model
chai    logits of the engine with CHAI, against the torch oracle given the engine's own head maps
greedy  each token the engine chose, against the one the reference finds most probable at that place
maps    the engine's head maps, against those the oracle finds by itself

A bundle with static membership has no weights left for all heads, and its maps are those of its manifest:
there "all" is not compared, and "chai" is the engine against the oracle under these maps, on whole weights.

The reference is fed the engine's tokens rather than generating its own. The first token that differs is
the same either way, and one forward pass replaces one per token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError
from chai_export.models.logits import largest_difference
from chai_export.models.text import Text, leading_special_tokens, read_tokens
from chai_export.progress import track
from chai_export.quality.limits import position_limit
from chai_export.quality.reference import fixed_maps, load_reference, oracle_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.manifest import Manifest
    from chai_export.models.oracle import Oracle
    from chai_export.runtime.runner import Runner

TOLERANCES = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 3e-1}
"""Largest absolute logit difference allowed, by the dtype of the bundle."""

LEAST_MAP_AGREEMENT = {"float32": 0.95, "float16": 0.0, "bfloat16": 0.0}
"""Head maps are integers of rounded probabilities: a correct engine may differ in single heads of a deep
model, a wrong one differs in most. In lower precision rounding alone moves many, so nothing is demanded."""

_LONGEST_PROMPT = 24
_SEED = 20240312


@dataclass(frozen=True)
class VerifyResult:
    """What was found; ``ok`` is the gate.

    Attributes:
        ok: differences within tolerance, greedy tokens the same and, in float32, the head maps too.
        max_abs_logit_diff: {"all": …, "chai": …}; None for "all" of a bundle with static membership.
        greedy_match: {"all": …, "chai": …}, likewise.
        head_map_agreement: share of query heads with the same representative, 0 … 1.
        tolerance: allowed logit difference.
        prompts: prompts compared.
        tokens: positions compared per way of running.
        greedy_ties: chosen tokens whose logit equals the reference's best within the tolerance; they count
            as a match.
        first_mismatch: {"all"|"chai": {"prompt", "token"}} where greedy tokens first differ.
    """

    ok: bool
    max_abs_logit_diff: dict[str, float | None]
    greedy_match: dict[str, bool | None]
    head_map_agreement: float
    tolerance: float
    prompts: int
    tokens: int
    greedy_ties: int
    first_mismatch: dict[str, dict[str, int]]

    def to_json(self) -> dict[str, Any]:
        """As printed by ``verify --json``."""
        return {
            "ok": self.ok,
            # JSON has no infinity, which stands for logits that are not finite.
            "max_abs_logit_diff": {
                heads: None if worst is None else min(worst, sys.float_info.max)
                for heads, worst in self.max_abs_logit_diff.items()
            },
            "greedy_match": self.greedy_match,
            "head_map_agreement": self.head_map_agreement,
            "tolerance": self.tolerance,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "greedy_ties": self.greedy_ties,
            "first_mismatch": self.first_mismatch,
        }


def verify(
    bundle: str | Path,
    reference: str | Path | PreTrainedModel,
    *,
    text: Text | None = None,
    backend: str = "onnxruntime",
    tolerance: float | None = None,
    new_tokens: int = 64,
    trust_remote_code: bool = False,
) -> VerifyResult:
    """Compare a bundle on one backend with the Hugging Face model it came from.

    The reference has the bundle's rounded weights and computes in float32.

    Args:
        bundle: directory of the bundle.
        reference: directory, hub id or model.
        text: where the four prompts come from; random tokens otherwise.
        backend: the engine to verify.
        tolerance: largest absolute logit difference; by the bundle's dtype unless given.
        new_tokens: greedy tokens per prompt, fewer where the model has no positions left.
        trust_remote_code: run code that the model brings along.

    Raises:
        ChaiError: bundle, model or text cannot be used, or the two have different sizes.
    """
    from chai_export.runtime.runner import load

    runners = {"chai": load(bundle, backend=backend, heads="chai")}
    manifest = runners["chai"].bundle.manifest
    static = fixed_maps(manifest)
    if static is None:
        runners = {"all": load(bundle, backend=backend, heads="all"), **runners}
    model = load_reference(reference, manifest, trust_remote_code=trust_remote_code)
    allowed = TOLERANCES[manifest.dtype] if tolerance is None else tolerance
    prompts = _prompts(runners["chai"], text, manifest)
    oracle = oracle_of(model, manifest)
    # Fixed maps are constants of the graph: nothing may round them.
    least_agreement = LEAST_MAP_AGREEMENT[manifest.dtype] if static is None else 1.0
    comparison = _Comparison(allowed, least_agreement, tuple(runners))
    for heads in track(tuple(runners), "verifying", total=len(runners)):
        count = _new_tokens(runners[heads], max(map(len, prompts)), new_tokens)
        made = runners[heads].generate(prompts, max_new_tokens=count, repetition_penalty=1.0, ignore_eos=True)
        generated_maps = runners[heads].head_maps.copy()
        for index, generation in enumerate(made):
            case = _Case(index, prompts[index], list(generation.token_ids), generated_maps[:, index])
            _compare_one(comparison, heads, case, runners[heads], oracle, static)
    return comparison.result(len(prompts))


class _Comparison:
    """Collects the worst of everything."""

    def __init__(self, tolerance: float, least_agreement: float, compared: tuple[str, ...]) -> None:
        self._tolerance = tolerance
        self._least_agreement = least_agreement
        self._worst = dict.fromkeys(compared, 0.0)
        self._mismatch: dict[str, dict[str, int]] = {}
        self._same_heads: list[bool] = []
        self._ties = 0
        self._tokens = 0

    def logits(self, heads: str, engine: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
        """Logits [T, V] of both."""
        self._worst[heads] = max(self._worst[heads], largest_difference(engine, reference))
        self._tokens += len(engine) if heads == "chai" else 0

    def greedy(self, heads: str, prompt: int, chosen: Sequence[int], reference: NDArray[np.float32]) -> None:
        """Tokens the engine chose, and reference logits [len(chosen), V] at the positions before them."""
        for place, (token, row) in enumerate(zip(chosen, reference, strict=True)):
            best = int(row.argmax())
            if token == best:
                continue
            if row[best] - row[token] <= self._tolerance:
                self._ties += 1
            elif heads not in self._mismatch:
                self._mismatch[heads] = {"prompt": prompt, "token": place}

    def maps(self, engine: NDArray[np.int32], oracle: NDArray[np.int32]) -> None:
        """Head maps of one sequence, [L, H] each."""
        self._same_heads.extend((engine == oracle).ravel().tolist())

    def result(self, prompts: int) -> VerifyResult:
        """The verdict."""
        agreement = float(np.mean(self._same_heads))
        close = all(worst <= self._tolerance for worst in self._worst.values())
        return VerifyResult(
            ok=close and not self._mismatch and agreement >= self._least_agreement,
            max_abs_logit_diff={heads: self._worst.get(heads) for heads in ("all", "chai")},
            greedy_match={
                heads: heads not in self._mismatch if heads in self._worst else None
                for heads in ("all", "chai")
            },
            head_map_agreement=agreement,
            tolerance=self._tolerance,
            prompts=prompts,
            tokens=self._tokens,
            greedy_ties=self._ties,
            first_mismatch=self._mismatch,
        )


@dataclass(frozen=True)
class _Case:
    """A prompt, the tokens that the engine made for it, and the head maps [L, H] it made them under."""

    index: int
    prompt: list[int]
    chosen: list[int]
    maps: NDArray[np.int32]


def _compare_one(
    comparison: _Comparison,
    heads: str,
    case: _Case,
    runner: Runner,
    oracle: Oracle,
    static: NDArray[np.int32] | None,
) -> None:
    from chai_export.models.oracle import model_logits

    sequence = case.prompt + case.chosen
    engine = runner.logits(sequence)
    maps = runner.head_maps[:, 0]
    if heads == "all":
        reference = expected = model_logits(oracle.model, sequence)
    elif static is not None:
        reference = expected = oracle.logits(sequence, static)
        comparison.maps(maps, static)
        comparison.maps(case.maps, static)
    else:
        reference = oracle.logits(sequence, maps)
        # Rounding in a batch may have given other maps; tokens are judged under those they were made with.
        same = bool((maps == case.maps).all())
        expected = reference if same else oracle.logits(sequence, case.maps)
        oracle.logits(sequence[: oracle.probe_tokens])
        comparison.maps(maps, oracle.head_maps[:, 0])
    comparison.logits(heads, engine, reference)
    comparison.greedy(heads, case.index, case.chosen, expected[len(case.prompt) - 1 : len(sequence) - 1])


def _new_tokens(runner: Runner, longest_prompt: int, wanted: int) -> int:
    limit = position_limit(runner)
    room = wanted if limit is None else min(wanted, limit - longest_prompt)
    if room < 1:
        raise ChaiError(
            f"the bundle has {limit} positions, too few to verify prompts of {longest_prompt} tokens; "
            "build the engine with a larger --max-seq"
        )
    return room


def _prompts(runner: Runner, text: Text | None, manifest: Manifest) -> list[list[int]]:
    """Four prompts of different lengths, one shorter than the probe, one just past it."""
    probe = manifest.probe_tokens
    lengths = [max(1, probe - 2), probe + 1, _LONGEST_PROMPT // 2 + probe, _LONGEST_PROMPT + probe]
    limit = position_limit(runner)
    if limit is not None:
        lengths = [max(1, min(length, limit // 2)) for length in lengths]
    leading = leading_special_tokens(runner.tokenizer)
    needed = sum(lengths)
    if text is None:
        tokens = np.random.default_rng(_SEED).integers(0, manifest.vocab_size, needed).astype(np.int32)
    else:
        tokens = read_tokens(text, runner.tokenizer, needed)
        if len(tokens) < needed:
            raise ChaiError(f"the text has {len(tokens)} tokens, the prompts need {needed}; give more text")
    prompts = []
    for length in lengths:
        prompts.append((leading + tokens[:length].tolist())[:length])
        tokens = tokens[length:]
    return prompts
