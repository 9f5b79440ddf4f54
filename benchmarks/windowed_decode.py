"""Decode of a windowed layer by length of the text, into benchmarks/results/windowed-decode-<name>.json.

    python benchmarks/windowed_decode.py NAME [--threads N] [--seconds S] [--window W] [--length T …]

The op's CPU kernel, one new token of each row, on pages of the window alone, as runners hold them: at a text
as long as the window and at longer ones, interleaved; without a window in a run of their own, since
those empty the processor's caches. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chai_export.bench import machine
from chai_export.bench.clustered import PAGE_LENGTH, clustered_head_attention
from chai_export.bench.phase import Phase
from chai_export.bench.problem import Problem, Shape
from chai_export.bench.timing import interleaved

HEADS = {"gemma3_270m": (4, 1, 256), "8_of_32_heads": (32, 8, 128)}
"""Query heads, KV heads and head dim."""
FORMS = {"32/32": (0, 0), "8/8": (8, 8)}
ALLOWED = 1.1
"""Of the time at the window."""


def measure(
    heads: tuple[int, int, int], batch: int, arguments: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds and their spread by form, length and whether there is a window."""
    query_heads, kv_heads, dim = heads
    found: dict[str, dict[str, dict[str, float]]] = {}
    for form, bits in FORMS.items():
        found[form] = {}
        for what, window in (("windowed", arguments.window), ("whole", 0)):
            runs: dict[str, Callable[[], Any]] = {}
            for length in (arguments.window, *arguments.length):
                problem = Problem(Shape(Phase.DECODE, batch, query_heads, kv_heads, kv_heads, dim, length))
                runs[f"{length} {what}"] = clustered_head_attention(
                    problem, kv_heads, bits, arguments.threads, window=window
                )
            timings = interleaved(runs, min_seconds=arguments.seconds)
            found[form] |= {
                name: {"ms": round(timing.median, 4), "spread": round(timing.spread, 3)}
                for name, timing in timings.items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--length", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    machine.let_idle_threads_sleep()
    cases = []
    for (name, heads), batch in ((item, batch) for item in HEADS.items() for batch in arguments.batch):
        found = measure(heads, batch, arguments)
        at_window = f"{arguments.window} windowed"
        ratios = {
            f"{form} at {length}": round(times[f"{length} windowed"]["ms"] / times[at_window]["ms"], 3)
            for form, times in found.items()
            for length in arguments.length
        }
        cases.append({"heads": name, "B": batch, "times": found, "of_the_time_at_the_window": ratios})
        print(name, batch, json.dumps(ratios), flush=True)
    worst = max(ratio for case in cases for ratio in case["of_the_time_at_the_window"].values())
    result = {
        "machine": machine.describe(),
        "threads": arguments.threads,
        "window": arguments.window,
        "page": PAGE_LENGTH,
        "cases": cases,
        "worst": worst,
        "within_a_tenth": worst <= ALLOWED,
    }
    path = Path(__file__).parent / "results" / f"windowed-decode-{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: at worst {worst} of the time at the window")


if __name__ == "__main__":
    main()
