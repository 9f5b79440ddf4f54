"""What a row in its prompt costs seven rows that decode, on a random Llama of 370 M parameters.

Writes benchmarks/results/mixed-batch-<name>.json: milliseconds of the seven rows' step alone, of the chunk of
the prompt alone, of both as the runner divides them into calls, and of one padded call for all eight rows.

Run it on a machine that does nothing else: python benchmarks/mixed_batch.py NAME [--work DIR]
It takes about ten minutes. ``--work`` may be that of generate.py, whose bundles it uses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from generate import LAYERS, REPOSITORY, make_bundle, make_model
from numpy.typing import NDArray

from chai_export.bench import machine
from chai_export.bench.timing import interleaved
from chai_export.bundle.bundle import Bundle
from chai_export.runtime.calls import plan_calls
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession

DECODING = 7
PATTERN = "paper_7b"
Ids = NDArray[np.int64]


class Rows:
    """Seven rows with a text each, and an eighth for the prompt."""

    def __init__(self, bundle: Path, context: int, chunk: int, threads: int) -> None:
        loaded = Bundle.load(bundle)
        self._session = OnnxRuntimeSession(loaded, threads=threads)
        self._session.begin(DECODING + 1, max(context + 1, chunk))
        random = np.random.default_rng(0)
        texts = random.integers(0, loaded.manifest.vocab_size, (DECODING, context))
        self._past = [context] * DECODING + [0]
        self._new: list[Ids] = [*texts[:, -1:], random.integers(0, loaded.manifest.vocab_size, chunk)]
        for start in range(0, context, 512):
            self._feed(range(DECODING), [text[start : start + 512] for text in texts], [start] * DECODING)

    def step(self, rows: list[int]) -> None:
        """One call: every row feeds what it has to feed, padded to the longest."""
        self._feed(rows, [self._new[row] for row in rows], [self._past[row] for row in rows])

    def divided(self) -> None:
        """All rows, in the calls that the runner makes."""
        for call in plan_calls([len(ids) for ids in self._new]):
            self.step(call)

    def _feed(self, rows: Any, new: list[Ids], past: list[int]) -> None:
        lengths = np.array([len(ids) for ids in new], np.int32)
        padded = np.zeros((len(new), lengths.max()), np.int64)
        for line, ids in zip(padded, new, strict=True):
            line[: len(ids)] = ids
        last = (lengths - 1).astype(np.int64)[:, None]
        self._session.step(padded, lengths, np.array(past, np.int32), last, None, list(rows))


def measure(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    rows = Rows(bundle, arguments.context, arguments.chunk, arguments.threads)
    every = list(range(DECODING + 1))
    calls: dict[str, Callable[[], None]] = {
        "decode": lambda: rows.step(every[:-1]),
        "prompt": lambda: rows.step(every[-1:]),
        "divided": rows.divided,
        "padded": lambda: rows.step(every),
    }
    times = interleaved(calls, min_rounds=arguments.rounds, max_rounds=arguments.rounds)
    apart = times["decode"].median + times["prompt"].median
    return {
        "ms": {name: timing.median for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "divided_over_apart": times["divided"].median / apart,
        "padded_over_apart": times["padded"].median / apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", help="of the machine, such as milan-2")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each row that decodes")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--cache", default="8/4", help="bits of keys/values")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--work", type=Path, help="keep model and bundle here")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script")
    parser.add_argument("--hidden", type=int, default=1024, help="smaller, to try the script")
    arguments = parser.parse_args()
    path = REPOSITORY / "benchmarks" / "results" / f"mixed-batch-{arguments.name}.json"
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "model").exists():
            make_model(work / "model", arguments.layers, arguments.hidden)
        result = measure(make_bundle(work, PATTERN, arguments.cache, arguments.layers), arguments)
    settings = {name: getattr(arguments, name) for name in ("context", "chunk", "cache", "rounds")}
    report = {"machine": machine.describe(), "pattern": PATTERN, **settings, **result}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
