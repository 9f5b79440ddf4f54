"""The gate between a bundle and its use: does it compute what its model computes?

Four comparisons, each on a full sequence of a prompt and the tokens that the engine itself made for it:

all     logits of the engine with every head kept, against the Hugging Face model
chai    logits of the engine with CHAI, against the torch oracle given the engine's own head maps
greedy  each token the engine chose, against the one the reference finds most probable at that place
maps    the engine's head maps, against those the oracle finds by itself

A bundle that caches rows in fewer bits has its graph compared a second time, with rows as they are computed:
what storing moves hides no mistake there.

A bundle with quantised weights is compared with a model whose weights are what its codes stand for, both
with exact activations, after its codes were found to be the nearest to the model's weights
(:mod:`chai_export.quality.quantised_weights`).

A bundle with static membership has no weights left for all heads, and its maps are those of its manifest:
there "all" is not compared, and "chai" is the engine against the oracle under these maps, on whole weights.

Where rotary embedding changes with the length of a text, or a window begins to hide its first tokens, texts
on both sides of that length are compared as well, fed in chunks, and one that grows past it in company
(:mod:`chai_export.quality.boundaries`).

The reference is fed the engine's tokens rather than generating its own. The first token that differs is
the same either way, and one forward pass replaces one per token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chai_export.arguments import as_real, shown, whole
from chai_export.bundle.choices import Backend, Heads, SourceKind
from chai_export.errors import UsageError
from chai_export.models.reference import load_reference
from chai_export.models.rope import rope_of
from chai_export.models.text import Text
from chai_export.progress import track
from chai_export.quality.boundaries import (
    Boundary,
    find_boundaries,
    lengths_around,
    pieces,
    stretches,
)
from chai_export.quality.limits import position_limit
from chai_export.quality.prompts import SEED, room_after, verify_prompts
from chai_export.quality.quantised_weights import exact_activations_of, take_quantised_weights
from chai_export.quality.truth import Expected, TorchTruth, Truth
from chai_export.quality.verdict import LEAST_MAP_AGREEMENT, Verdict, VerifyResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.runtime.runner import Runner


def verify(
    bundle: str | Path,
    reference: str | Path | PreTrainedModel,
    *,
    text: Text | None = None,
    backend: Backend | str = Backend.ONNXRUNTIME,
    tolerance: float | None = None,
    new_tokens: int = 64,
    trust_remote_code: bool = False,
) -> VerifyResult:
    """Compare a bundle on one backend with the Hugging Face model or the ONNX file it came from.

    A model has the bundle's rounded weights and computes in float32; a file runs in ONNX Runtime, see
    :mod:`chai_export.quality.verify_source`.

    Args:
        bundle: directory of the bundle.
        reference: directory, hub id or model; or an ONNX file, or a directory with one.
        text: where the four prompts come from; random tokens otherwise.
        backend: the engine to verify.
        tolerance: largest absolute logit difference, everywhere; unless given, each position is allowed what
            rounding in the bundle's dtype does there (:mod:`chai_export.quality.rounding`).
        new_tokens: greedy tokens per prompt, fewer where the model has no positions left.
        trust_remote_code: run code that the model brings along.

    Raises:
        UsageError: the bundle was rewritten from a file with quantised weights and the reference is a
            Hugging Face model.
        ChaiError: bundle, model or text cannot be used, or the two have different sizes.
    """
    from chai_export.quality.verify_source import is_onnx, verify_source
    from chai_export.runtime.runner import load

    whole(new_tokens, "--new-tokens")
    bound = 0.0 if tolerance is None else as_real(tolerance)
    if bound is None or not bound >= 0.0:
        raise UsageError(f"--tolerance is {shown(tolerance)}; give a number from 0")
    if isinstance(reference, (str, Path)) and is_onnx(reference):
        return verify_source(
            bundle,
            reference,
            text=text,
            backend=Backend(backend),
            tolerance=bound if tolerance is not None else None,
            new_tokens=new_tokens,
        )
    runners = {"chai": load(bundle, backend=backend, heads="chai")}
    manifest = runners["chai"].bundle.manifest
    if manifest.weights is not None and manifest.source.kind is SourceKind.ONNX:
        raise UsageError(
            f"{bundle} has {manifest.weights} weights, which no Hugging Face model has, so the two differ; "
            "give the ONNX file that it was made from: --reference FILE.onnx"
        )
    if manifest.static is None:
        runners = {"all": load(bundle, backend=backend, heads="all"), **runners}
    model = load_reference(reference, manifest, trust_remote_code=trust_remote_code)
    weights, as_it_runs = None, {}
    if manifest.weights is not None:
        model = copy.deepcopy(model) if model is reference else model
        weights = take_quantised_weights(model, runners["chai"].bundle)
        if Backend(backend) is Backend.ONNXRUNTIME:
            as_it_runs, runners = runners, _with_exact_activations(runners)
    truth = TorchTruth(model, runners["chai"].bundle)
    twins = _with_exact_rows(runners) if Backend(backend) is Backend.ONNXRUNTIME else {}
    prompts = verify_prompts(runners["chai"], text, position_limit(runners["chai"]))
    # Fixed maps are constants of the graph: nothing may round them.
    least_agreement = LEAST_MAP_AGREEMENT[manifest.dtype] if manifest.static is None else 1.0
    verdict = Verdict(tuple(runners), least_agreement, tolerance, as_it_runs=bool(as_it_runs))
    for heads in track(tuple(runners), "verifying", total=len(runners)):
        count = room_after(max(map(len, prompts)), new_tokens, position_limit(runners[heads]))
        made = runners[heads].generate(prompts, max_new_tokens=count, repetition_penalty=1.0, ignore_eos=True)
        generated_maps = runners[heads].head_maps.copy()
        for index, generation in enumerate(made):
            case = _Case(index, prompts[index], list(generation.token_ids), generated_maps[:, index])
            expected = _compare(verdict, heads, case, runners[heads], truth, twins.get(heads))
            if expected is not None and heads in as_it_runs:
                exact = expected.logits if expected.exact is None else expected.exact
                verdict.distance(heads, as_it_runs[heads].logits(case.prompt + case.chosen), exact)
    windows = {window for window in manifest.windows or () if window}
    lengths = {*rope_of(model.config).original_lengths, *manifest.switch_lengths, *windows}
    boundaries = find_boundaries(lengths, position_limit(runners["chai"]))
    for index, boundary in enumerate((b for b in boundaries if b.crossed), start=len(prompts)):
        for heads, runner in runners.items():
            _cross(verdict, heads, index, boundary, runner, truth)
    result = verdict.result()
    nearest = weights is None or weights.farthest <= 1.0
    return replace(result, ok=result.ok and nearest, boundaries=tuple(boundaries), weights=weights)


def _with_exact_activations(runners: dict[str, Runner]) -> dict[str, Runner]:
    from chai_export.runtime.runner import Runner
    from chai_export.runtime.session import open_session

    bundle = runners["chai"].bundle
    graph = exact_activations_of(bundle)
    return {
        heads: Runner(
            bundle,
            open_session(bundle, Backend.ONNXRUNTIME, Heads(heads), graph=graph),
            Backend.ONNXRUNTIME,
            Heads(heads),
        )
        for heads in runners
    }


def _with_exact_rows(runners: Mapping[str, Runner]) -> dict[str, Runner]:
    """The same graphs with rows that are cached as they are computed; none where the bundle does that."""
    from chai_export.quality.source_truth import with_exact_rows
    from chai_export.runtime.runner import Runner
    from chai_export.runtime.session import open_session

    twins = {}
    for name, runner in runners.items():
        if not runner.bundle.manifest.storage.rounds:
            continue
        (bundle, graph), heads = with_exact_rows(runner.bundle), Heads(name)
        session = open_session(bundle, Backend.ONNXRUNTIME, heads, graph=graph)
        twins[name] = Runner(bundle, session, Backend.ONNXRUNTIME, heads)
    return twins


@dataclass(frozen=True)
class _Case:
    """A prompt, the tokens that the engine made for it, and the head maps [L, H] it made them under."""

    index: int
    prompt: list[int]
    chosen: list[int]
    maps: NDArray[np.int32]


def _compare(
    verdict: Verdict, heads: str, case: _Case, runner: Runner, truth: Truth, twin: Runner | None = None
) -> Expected | None:
    """What was expected of the whole sequence, where it was compared as a whole."""
    switches = runner.bundle.manifest.switch_lengths
    if switches:
        _compare_stretches(verdict, heads, case, runner, truth)
        return None
    sequence = case.prompt + case.chosen
    engine = runner.logits(sequence)
    maps = runner.head_maps[:, 0]
    if heads == "all":
        expected = generated = truth.all_heads(sequence)
    else:
        expected = truth.chai(sequence, maps)
        # Rounding in a batch may have given other maps; tokens are judged under those they were made with.
        same = bool((maps == case.maps).all())
        generated = expected if same else truth.chai(sequence, case.maps)
        verdict.maps(maps, truth.head_maps(sequence))
        if runner.bundle.manifest.static is not None:
            verdict.maps(case.maps, truth.head_maps(sequence))
    verdict.logits(heads, engine, expected)
    verdict.greedy(heads, case.index, case.chosen, generated)
    if twin is not None:
        logits, same = twin.logits(sequence), bool((twin.head_maps[:, 0] == maps).all())
        under = expected if heads == "all" or same else truth.chai(sequence, twin.head_maps[:, 0])
        verdict.exact_rows(heads, logits, under)
    return expected


def _compare_stretches(verdict: Verdict, heads: str, case: _Case, runner: Runner, truth: Truth) -> None:
    """As :func:`_compare`, with the tokens of each set of rotary factors against texts that have that set."""
    sequence = case.prompt + case.chosen
    switches = runner.bundle.manifest.switch_lengths
    for start, end in stretches(len(case.prompt), len(sequence), switches):
        fed, chosen = sequence[: end - 1], sequence[start:end]
        engine = runner.logits(fed)
        maps = runner.head_maps[:, 0]
        expected = truth.all_heads(fed) if heads == "all" else truth.chai(fed, maps)
        verdict.logits(heads, engine, expected)
        if heads == "chai":
            verdict.maps(maps, truth.head_maps(fed))
            # The maps that earlier stretches were made under are gone, and rounding may have given others.
            if end < len(sequence):
                continue
            expected = expected if (maps == case.maps).all() else truth.chai(fed, case.maps)
        after = Expected(np.pad(expected.logits, ((0, 1), (0, 0))), np.pad(expected.tolerances, (0, 1)))
        verdict.greedy(heads, case.index, chosen, after)


def _cross(
    verdict: Verdict, heads: str, index: int, boundary: Boundary, runner: Runner, truth: Truth
) -> None:
    """Compare texts below and above a boundary in chunks, and one that crosses it beside a short one."""
    manifest = runner.bundle.manifest
    longest = lengths_around(boundary)[-1]
    tokens = np.random.default_rng(SEED + index).integers(0, manifest.vocab_size, longest).tolist()
    for length in lengths_around(boundary):
        engine = runner.logits(tokens[:length], chunks=pieces(length, manifest.probe_tokens))
        maps = runner.head_maps[:, 0]
        fed = tokens[:length]
        verdict.logits(heads, engine, truth.all_heads(fed) if heads == "all" else truth.chai(fed, maps))
    prompts = [tokens[: max(1, boundary.length - 1)], tokens[: max(1, boundary.length // 2)]]
    made = runner.generate(prompts, max_new_tokens=3, repetition_penalty=1.0, ignore_eos=True)
    generated_maps = runner.head_maps.copy()
    for row, (prompt, generation) in enumerate(zip(prompts, made, strict=True)):
        case = _Case(index, prompt, list(generation.token_ids), generated_maps[:, row])
        _compare(verdict, heads, case, runner, truth)
