"""``chai-export bench attention``: the op alone against the attention of ONNX Runtime, ONNX and torch.

Before an implementation is timed, its output is compared with the op's at R = G. Times are medians of
interleaved runs; the caches of any case are larger than what the other implementations leave in the
processor's cache.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import psutil

from chai_export.arguments import require_at_least_one
from chai_export.bench import machine
from chai_export.bench.op_session import OpSession
from chai_export.bench.peers import PEERS, SkippedError
from chai_export.bench.phase import Phase
from chai_export.bench.problem import Problem, Shape
from chai_export.bench.timing import Timing, interleaved
from chai_export.errors import ChaiError, reason
from chai_export.op.probe import PAPER_PROBE_TOKENS
from chai_export.progress import track
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library

ALL_HEADS = "chai_all_heads"
ATTRIBUTES = {"scale": 0.0, "probe_tokens": PAPER_PROBE_TOKENS, "online": 1}
AGREEMENT = {"float32": 2e-4, "float16": 2e-2}


LENGTHS = (2048, 8192, 32768)
PROMPTS = (2048, 8192)


def default_cases(*, dtype: str = "float32", head_dim: int = 128) -> list[Shape]:
    """Heads as in a 7B model, multi-head and grouped, kept and not: the cases that the project reports."""
    heads = ((32, 32, 8), (32, 8, 4), (32, 32, 32))
    decode = [Shape(Phase.DECODE, b, *h, head_dim, t, dtype) for h in heads for b in (1, 8) for t in LENGTHS]
    prefill = [Shape(Phase.PREFILL, 1, *h, head_dim, t, dtype) for h in heads for t in PROMPTS]
    return decode + prefill


def bench_attention(
    cases: Iterable[Shape], *, threads: int | None = None, min_seconds: float = 1.0
) -> dict[str, Any]:
    """Measure every case; the result is what ``bench attention --json`` prints.

    Args:
        cases: see :func:`default_cases`.
        threads: of every implementation; all cores that this process may use by default.
        min_seconds: time spent on each implementation of a case at least.

    Raises:
        UsageError: fewer than one thread.
        ChaiError: the native library is not installed, or an implementation disagrees with the op.
    """
    require_at_least_one(threads=threads)
    if find_library(ONNXRUNTIME_LIBRARY) is None:
        raise ChaiError("the native library is not installed; run `chai-export doctor` for what to install")
    machine.let_idle_threads_sleep()
    cores = threads or len(os.sched_getaffinity(0))
    bandwidth = machine.read_bandwidth(cores)
    results = [_measure(case, cores, min_seconds) for case in track(list(cases), "bench attention")]
    return {
        "machine": machine.describe(),
        "threads": cores,
        "read_bandwidth_gb_s": bandwidth,
        "cases": results,
    }


def _measure(case: Shape, threads: int, min_seconds: float) -> dict[str, Any]:
    if 1.3 * case.cache_bytes > psutil.virtual_memory().available:
        return _row(case, {}, {"all": f"the caches take {case.cache_bytes / 1e9:.1f} GB"})
    problem = Problem(case)
    runs, skipped = _implementations(problem, threads)
    timings = interleaved(runs, min_seconds=min_seconds)
    del runs, problem
    gc.collect()
    return _row(case, timings, skipped)


def _implementations(problem: Problem, threads: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """All that can run the problem, checked against each other, and why the rest cannot."""
    case = problem.case
    all_heads = _op(problem, case.kv_heads, threads)
    expected = np.array(all_heads(), np.float32)
    runs: dict[str, Callable[[], Any]] = {"chai": _op(problem, case.kept, threads)}
    if case.kept < case.kv_heads:
        runs[ALL_HEADS] = all_heads
    skipped: dict[str, str] = {}
    for name, build in PEERS.items():
        try:
            run = build(problem, threads)
            output = run()
        except (SkippedError, MemoryError, RuntimeError) as error:
            skipped[name] = reason(error)
            continue
        difference = float(np.abs(output.astype(np.float32) - expected).max())
        if difference > AGREEMENT[case.dtype]:
            raise ChaiError(f"{name} differs from the op by {difference:.2g} on {case}; report this")
        runs[name] = run
    return runs, skipped


def _op(problem: Problem, kept: int, threads: int) -> Callable[[], Any]:
    library = find_library(ONNXRUNTIME_LIBRARY)
    assert library is not None
    session = OpSession(ATTRIBUTES, problem.case.dtype, library, threads=threads)
    bound = session.bind(problem.op_inputs(kept), in_place=True)
    return lambda: bound.run().output


def _row(case: Shape, timings: dict[str, Timing], skipped: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "phase": case.phase,
        "B": case.batch,
        "H": case.heads,
        "G": case.kv_heads,
        "R": case.kept,
        "D": case.head_dim,
        "T": case.length,
        "dtype": case.dtype,
        "ceiling": case.ceiling,
        "skipped": skipped,
    }
    if not timings:
        return row
    chai = timings["chai"]
    peers = {name: timing for name, timing in timings.items() if name != "chai"}
    best = min(peers, key=lambda name: peers[name].median)
    row |= {
        "chai_ms": chai.median,
        "peers_ms": {name: timing.median for name, timing in peers.items()},
        "best_peer": best,
        "speedup_vs_best_peer": peers[best].median / chai.median,
        "spread": {name: timing.spread for name, timing in timings.items()},
    }
    if case.phase is Phase.DECODE:
        row["bandwidth_gb_s"] = case.bytes_read / chai.median / 1e6
    return row
