"""``chai-export bench attention``: the op alone against the attention of ONNX Runtime, ONNX and torch.

CHAI's caches lie in pages of random order, in the precision of the case; the others' in one piece. Before an
implementation is timed, its output is compared with the exact op's at R = G. Times are medians of interleaved
runs; the caches of any case are larger than what the other implementations leave in the processor's cache.
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
from chai_export.bench.clustered import clustered_head_attention
from chai_export.bench.peers import PEERS, Run, SkippedError
from chai_export.bench.phase import Phase
from chai_export.bench.problem import Problem, Shape
from chai_export.bench.quantised_peers import half_group_query_attention, quantised_group_query_attention
from chai_export.bench.timing import Timing, interleaved
from chai_export.errors import ChaiError, reason
from chai_export.progress import track
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library

ALL_HEADS = "chai_all_heads"

AGREEMENT = {"float32": 2e-4, "float16": 2e-2}
"""Largest absolute differences of implementations that compute the same."""

QUANTISED_PEERS: dict[str, tuple[Callable[[Problem, int], Run], float]] = {
    "ort_gqa_int8": (quantised_group_query_attention(8), 0.1),
    "ort_gqa_int4": (quantised_group_query_attention(4), 1.0),
    "ort_gqa_float16": (half_group_query_attention, 0.05),
}
"""Peers of less precision, and how far they may be off, as a share of the largest output: random values lose
more than a model's, and a wrong one is off by about 1.4."""

_COPIES = 3.5
"""Caches of all implementations together, in sizes of the case's own."""

LENGTHS = (2048, 8192, 32768)
PROMPTS = (2048, 8192)


def default_cases(*, dtype: str = "float32", head_dim: int = 128) -> list[Shape]:
    """Heads as in a 7B model, multi-head and grouped, kept and not: the cases that the project reports."""
    heads = ((32, 32, 8), (32, 8, 4), (32, 32, 32), (32, 8, 8))
    quantised = ((8, 8), (8, 4))
    decode = [Shape(Phase.DECODE, b, *h, head_dim, t, dtype) for h in heads for b in (1, 8) for t in LENGTHS]
    prefill = [Shape(Phase.PREFILL, 1, *h, head_dim, t, dtype) for h in heads for t in PROMPTS]
    return [
        *decode,
        *(Shape(Phase.DECODE, b, *h, head_dim, LENGTHS[1], dtype, *bits)
          for h in heads for bits in quantised for b in (1, 8)),
        *prefill,
        *(Shape(Phase.PREFILL, 1, *heads[0], head_dim, PROMPTS[0], dtype, *bits) for bits in quantised),
    ]  # fmt: skip


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
    if _COPIES * case.cache_bytes > psutil.virtual_memory().available:
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
    exact = clustered_head_attention(problem, case.kv_heads, (0, 0), threads)
    expected = np.array(exact(), np.float32)
    largest = float(np.abs(expected).max())
    own: dict[str, Callable[[], Any]] = {
        "chai": clustered_head_attention(problem, case.kept, case.bits, threads)
    }
    if case.bits != (0, 0):
        own[f"chai_{case.dtype}_all_heads"] = exact
        if case.kept < case.kv_heads:
            own[ALL_HEADS] = clustered_head_attention(problem, case.kv_heads, case.bits, threads)
    elif case.kept < case.kv_heads:
        own[ALL_HEADS] = exact
    skipped: dict[str, str] = {}
    runs = dict(own)
    peers = {name: (build, AGREEMENT[case.dtype]) for name, build in PEERS.items()}
    peers |= {name: (build, share * largest) for name, (build, share) in QUANTISED_PEERS.items()}
    for name, (build, tolerance) in peers.items():
        if name == "ort_gqa_float16" and case.dtype == "float16":
            continue  # ort_gqa is it
        try:
            run = build(problem, threads)
            output = run()
        except (SkippedError, MemoryError, RuntimeError) as error:
            skipped[name] = reason(error)
            continue
        difference = float(np.abs(output.astype(np.float32) - expected).max())
        if not difference <= tolerance:
            raise ChaiError(f"{name} differs from the op by {difference:.2g} on {case}; report this")
        runs[name] = run
    return runs, skipped


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
        "key_bits": case.key_bits,
        "value_bits": case.value_bits,
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
