"""Decode on caches in pages and in 32, 8 and 4 bits, into benchmarks/results/paged-attention-<name>.json.

    python benchmarks/paged_attention.py NAME [--threads N] [--seconds S] [--length T …] [--batch B …]

The op with all heads and with those kept, against itself in float32 with all heads and against ONNX Runtime's
GroupQueryAttention with float32, int8 and 4-bit caches, all in one interleaved run. Run it on a machine that
does nothing else. (A column ``contiguous_32_all_heads`` of older results is
version 1 of the op, which had one contiguous cache.)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chai_export.bench import machine
from chai_export.bench.clustered import PAGE_LENGTH, clustered_head_attention
from chai_export.bench.peers import Run, SkippedError, group_query_attention
from chai_export.bench.phase import Phase
from chai_export.bench.problem import Problem, Shape
from chai_export.bench.quantised_peers import quantised_group_query_attention
from chai_export.bench.timing import interleaved

HEADS = ((32, 32, 8), (32, 8, 4))
DIM = 128
FORMS = {"paged_32_32": (0, 0), "paged_16_16": (16, 16), "paged_8_8": (8, 8), "paged_8_4": (8, 4),
         "paged_4_4": (4, 4)}  # fmt: skip
BASELINE = "paged_32_32_all_heads"
PEERS: dict[str, Callable[[Problem, int], Run]] = {
    "ort_gqa": group_query_attention,
    "ort_gqa_int8": quantised_group_query_attention(8),
    "ort_gqa_int4": quantised_group_query_attention(4),
}


def measure(
    heads: tuple[int, int, int], batch: int, length: int, threads: int, seconds: float
) -> dict[str, Any]:
    """One case: all implementations in turn."""
    query_heads, kv_heads, kept = heads
    problem = Problem(Shape(Phase.DECODE, batch, query_heads, kv_heads, kept, DIM, length))
    runs: dict[str, Callable[[], Any]] = {}
    for name, bits in FORMS.items():
        runs[f"{name}_all_heads"] = clustered_head_attention(problem, kv_heads, bits, threads)
    for name in ("paged_32_32", "paged_8_8", "paged_8_4"):
        runs[f"{name}_kept_{kept}"] = clustered_head_attention(problem, kept, FORMS[name], threads)
    skipped = {}
    for name, build in PEERS.items():
        try:
            run = build(problem, threads)
            run()
        except (SkippedError, RuntimeError) as error:
            skipped[name] = str(error)[:200]
        else:
            runs[name] = run
    timings = interleaved(runs, min_seconds=seconds)
    base = timings[BASELINE].median
    return {
        "B": batch,
        "H": query_heads,
        "G": kv_heads,
        "R": kept,
        "D": DIM,
        "T": length,
        "page": PAGE_LENGTH,
        "ms": {name: round(timing.median, 3) for name, timing in timings.items()},
        "spread": {name: round(timing.spread, 3) for name, timing in timings.items()},
        "times_as_fast_as_float32_all_heads": {
            name: round(base / timing.median, 3) for name, timing in timings.items()
        },
        "skipped": skipped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--length", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    machine.let_idle_threads_sleep()
    bandwidth = machine.read_bandwidth(arguments.threads)
    cases = []
    for heads in HEADS:
        for batch in arguments.batch:
            for length in arguments.length:
                if batch * length > 1 << 17:  # more memory than the machines this runs on have
                    continue
                cases.append(measure(heads, batch, length, arguments.threads, arguments.seconds))
                print(json.dumps(cases[-1]["times_as_fast_as_float32_all_heads"]), flush=True)
                gc.collect()
    result = {
        "machine": machine.describe(),
        "threads": arguments.threads,
        "read_bandwidth_gb_s": bandwidth,
        "cases": cases,
    }
    path = Path(__file__).parent / "results" / f"paged-attention-{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
