"""`verify` for bundles of ONNX files: the bundle against the file it was made from.

Three gates, each on prompts and the tokens that the engine itself made for them:

exact       logits with every head kept against the file's, both in float32 with exact activations and rows
            that are kept as computed, so that any mistake in the graph shows however coarse the weights are
as written  the same of bundle and file as they are, fed in the same chunks; allowed is what the file differs
            from itself between batches, chunks and roundings. Not for caches in fewer bits, which no file has
chai        the compiled op against the op's function body, both of the exact bundle, with fewer heads

Where nothing is rounded beyond float32 "exact" and "as written" are one. The file has no CHAI, so the last
gate says that the op does what its definition says, and the first that all around it is the file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.errors import ChaiError
from chai_export.models.logits import differences, total_kl
from chai_export.models.text import Text
from chai_export.progress import track
from chai_export.quality.boundaries import Boundary, find_boundaries, lengths_around
from chai_export.quality.limits import position_limit
from chai_export.quality.prompts import SEED, room_after, verify_prompts
from chai_export.quality.source_truth import Source, SourceTruth, exact_twin, needs_twin
from chai_export.quality.truth import Expected
from chai_export.quality.verdict import LEAST_MAP_AGREEMENT, Gate, VerifyResult
from chai_export.runtime.runner import Runner, load
from chai_export.runtime.session import open_session

if TYPE_CHECKING:
    from chai_export.runtime.onnxruntime_model import GraphInMemory

EXACT, AS_WRITTEN, CHAI = "exact", "as written", "chai"
_SINGLES = 8
"""New tokens that are fed one by one, as decoding does; the rest follows at once."""


def is_onnx(reference: object) -> bool:
    """Whether a reference is an ONNX file, or a directory that holds one and no Hugging Face weights."""
    if not isinstance(reference, (str, Path)):
        return False
    path = Path(reference)
    if path.suffix == ".onnx":
        return True
    if not path.is_dir() or not any(path.glob("*.onnx")):
        return False
    return not any(file for pattern in ("*.safetensors", "*.bin", "*.gguf") for file in path.glob(pattern))


def verify_source(
    path: str | Path,
    reference: str | Path,
    *,
    text: Text | None,
    backend: Backend,
    tolerance: float | None,
    new_tokens: int,
) -> VerifyResult:
    """Compare a bundle with the ONNX file it was made from; arguments as those of ``verify``.

    Raises:
        ChaiError: bundle, file or text cannot be used, or the two have different sizes.
    """
    written = load(path, backend=backend, heads=Heads.ALL)
    bundle = written.bundle
    manifest = bundle.manifest
    source = Source(Path(reference), manifest)
    twin, graph = exact_twin(bundle) if needs_twin(bundle) else (bundle, None)
    exact = written if graph is None else _runner(twin, Heads.ALL, graph)
    limit = min((n for n in (position_limit(written), source.capacity) if n), default=None)
    prompts = verify_prompts(written, text, limit)
    room = room_after(max(map(len, prompts)), new_tokens, limit)

    not_compared: dict[str, str] = {}
    rounds = graph is not None or source.quantised_caches
    truth = source.exact() if rounds else source.as_written(exact=True)
    gates = [_Gate(EXACT, truth, exact, tolerance)]
    if manifest.storage.rounds:
        not_compared[AS_WRITTEN] = "the bundle's caches have fewer bits than the file's"
    elif rounds:
        try:
            together = truth.agrees_in_batches(prompts[-1])
            as_written = source.as_written(exact=False, batches=together)
            gates.append(_Gate(AS_WRITTEN, as_written, written, tolerance))
        except ChaiError as error:
            not_compared[AS_WRITTEN] = str(error)
    chai = _Chai(twin, graph, tolerance)
    if not chai.compared:
        not_compared[CHAI] = "there is no compiled op here, and the function body is what it is compared with"
    distance = _Distance(written) if manifest.storage.rounds else None
    steps = [(gate, index) for gate in gates for index in range(len(prompts))]
    made = {gate.name: gate.generate(prompts, room, manifest.switch_lengths) for gate in gates}
    tokens = 0
    for gate, index in track(steps, "verifying", total=len(steps)):
        fed, chosen = prompts[index] + made[gate.name][index], made[gate.name][index]
        chunks = _chunks(len(prompts[index]), len(fed), source, manifest.probe_tokens)
        if manifest.switch_lengths:
            chunks = [len(fed)]
        expected, known = gate.compare(fed, chunks)
        gate.greedy(index, chosen, expected, known)
        if gate is gates[0]:
            tokens += int(known.sum())
            chai.compare(fed, chunks, expected, known)
            if distance is not None:
                distance.add(fed, chunks, expected, known)
    boundaries = find_boundaries(manifest.switch_lengths, limit)
    for boundary in boundaries:
        if boundary.crossed:
            _compare_around(gates, boundary, manifest.vocab_size)
    result = _result(gates, chai, distance, len(prompts), tokens)
    return replace(result, boundaries=tuple(boundaries), not_compared=not_compared)


def _compare_around(gates: Sequence[_Gate], boundary: Boundary, vocabulary: int) -> None:
    """Texts below and above a length at which rotary embedding changes, each in one piece."""
    tokens = np.random.default_rng(SEED).integers(0, vocabulary, lengths_around(boundary)[-1]).tolist()
    for length in lengths_around(boundary):
        for gate in gates:
            gate.compare(tokens[:length], [length])


def _runner(bundle: Bundle, heads: Heads, graph: GraphInMemory | None, *, native: bool = True) -> Runner:
    session = open_session(bundle, Backend.ONNXRUNTIME, heads, graph=graph, native=native)
    return Runner(bundle, session, Backend.ONNXRUNTIME, heads)


def _chunks(prompt: int, total: int, source: Source, probe: int) -> list[int]:
    """The prompt, some tokens one by one, and the rest at once where the source takes that."""
    first = max(prompt, min(probe, total))
    rest = total - first
    singles = min(rest, _SINGLES) if source.chunks else rest
    parts = [first, *[1] * singles, rest - singles]
    return [part for part in parts if part]


class _Gate:
    """One comparison with the source, and its worst."""

    def __init__(self, name: str, truth: SourceTruth, runner: Runner, tolerance: float | None) -> None:
        self.name = name
        self._truth = truth
        self._runner = runner
        self._fixed = tolerance
        self.worst = self.used = self.largest = 0.0
        self.mismatch: dict[str, int] | None = None
        self.ties = 0

    def generate(self, prompts: list[list[int]], room: int, switches: Sequence[int]) -> list[list[int]]:
        """Greedy tokens for all prompts in one batch; none where they would cross a switch of rotary factors,
        since the file leaves cached keys as they are."""
        counts = [
            0 if any(len(prompt) <= length < len(prompt) + room for length in switches) else room
            for prompt in prompts
        ]
        wanted = [prompt for prompt, count in zip(prompts, counts, strict=True) if count]
        made = iter(
            self._runner.generate(wanted, max_new_tokens=room, repetition_penalty=1.0, ignore_eos=True)
        )
        return [list(next(made).token_ids) if count else [] for count in counts]

    def compare(self, tokens: list[int], chunks: list[int]) -> tuple[Expected, NDArray[np.bool_]]:
        """Logits of engine and source, fed alike."""
        expected, known = self._truth.expected(tokens, chunks)
        engine = self._runner.logits(tokens, chunks=chunks)
        if self._fixed is not None:
            expected = Expected(expected.logits, np.full(len(tokens), self._fixed))
        found, allowed = differences(engine[known], expected.logits[known]), expected.tolerances[known]
        self.worst = max(self.worst, float(found.max()))
        self.used = max(self.used, float(_share(found, allowed).max()))
        self.largest = max(self.largest, float(allowed.max()))
        return expected, known

    def greedy(self, prompt: int, chosen: list[int], expected: Expected, known: NDArray[np.bool_]) -> None:
        """Each token that the engine chose, against the one the source finds most probable there."""
        start = len(expected.logits) - len(chosen) - 1
        for place, token in enumerate(chosen):
            row = expected.logits[start + place]
            if not known[start + place] or int(row.argmax()) == token:
                continue
            if row.max() - row[token] <= expected.tolerances[start + place]:
                self.ties += 1
            elif self.mismatch is None:
                self.mismatch = {"prompt": prompt, "token": place}


class _Chai:
    """The compiled op against its function body, on the exact bundle."""

    def __init__(self, twin: Bundle, graph: GraphInMemory | None, tolerance: float | None) -> None:
        self._native = _runner(twin, Heads.CHAI, graph)
        self._body = _runner(twin, Heads.CHAI, graph, native=False)
        session: Any = self._native.session
        self.compared = session.library is not None
        self._fixed = tolerance
        self.worst = self.used = 0.0
        self._same: list[bool] = []

    @property
    def agreement(self) -> float:
        """Share of query heads with the same representative."""
        return float(np.mean(self._same)) if self._same else 1.0

    def compare(
        self, tokens: list[int], chunks: list[int], expected: Expected, known: NDArray[np.bool_]
    ) -> None:
        """Logits under the same maps; a prompt whose maps rounding has made different counts as that."""
        if not self.compared:
            return
        native, body = (runner.logits(tokens, chunks=chunks) for runner in (self._native, self._body))
        same = self._native.head_maps == self._body.head_maps
        self._same.extend(same.ravel().tolist())
        if not same.all():
            return
        allowed = expected.tolerances if self._fixed is None else np.full(len(tokens), self._fixed)
        found = differences(native, body)[known]
        self.worst = max(self.worst, float(found.max()))
        self.used = max(self.used, float(_share(found, allowed[known]).max()))


class _Distance:
    """How far the bundle as it is, whose caches have fewer bits, is from the exact file."""

    def __init__(self, written: Runner) -> None:
        self._runner = written
        self._found: list[NDArray[np.float64]] = []
        self._kl = 0.0

    def add(self, tokens: list[int], chunks: list[int], expected: Expected, known: NDArray[np.bool_]) -> None:
        """One sequence."""
        engine = self._runner.logits(tokens, chunks=chunks)
        self._found.append(differences(engine[known], expected.logits[known]))
        self._kl += total_kl(expected.logits[known], engine[known])

    def figures(self) -> dict[str, float]:
        """As ``distance_to_exact`` has them."""
        found = np.concatenate(self._found)
        return {"max_abs_logit_diff": float(found.max()), "kl": self._kl / len(found)}


def _share(found: NDArray[np.float64], allowed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Differences in units of what is allowed; 0 of 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        result: NDArray[np.float64] = np.where(found == 0.0, 0.0, found / allowed)
    return result


def _result(
    gates: Sequence[_Gate],
    chai: _Chai,
    distance: _Distance | None,
    prompts: int,
    tokens: int,
) -> VerifyResult:
    figures = [Gate(gate.name, "all", gate.worst, gate.used, gate.largest) for gate in gates]
    if chai.compared:
        figures.append(Gate(CHAI, "chai", chai.worst, chai.used, gates[0].largest))
    mismatch = next((gate.mismatch for gate in gates if gate.mismatch is not None), None)
    enough = chai.agreement >= LEAST_MAP_AGREEMENT["float32"]
    return VerifyResult(
        ok=all(figure.tolerance_used <= 1.0 for figure in figures) and mismatch is None and enough,
        max_abs_logit_diff={"all": gates[-1].worst, "chai": chai.worst if chai.compared else None},
        tolerance_used={
            "all": max(gate.used for gate in gates),
            "chai": chai.used if chai.compared else None,
        },
        greedy_match={"all": mismatch is None, "chai": None},
        head_map_agreement=chai.agreement,
        tolerance=gates[-1].largest,
        prompts=prompts,
        tokens=tokens,
        greedy_ties=sum(gate.ties for gate in gates),
        first_mismatch={} if mismatch is None else {"all": mismatch},
        distance_to_exact=None if distance is None else {"all": distance.figures()},
        gates=tuple(figures),
    )
