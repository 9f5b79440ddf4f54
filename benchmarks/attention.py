"""Every case of `chai-export bench attention`, into benchmarks/results/attention-<name>.json.

Run it on a machine that does nothing else: python benchmarks/attention.py NAME [--threads N] [--seconds S]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from chai_export.bench.attention import bench_attention, default_cases
from chai_export.bench.phase import Phase
from chai_export.bench.problem import Shape

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the machine, such as milan-2")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--most-bytes", type=float, default=10e9, help="largest caches to try")
    arguments = parser.parse_args()
    cases = [*default_cases(), *half_precision()]
    fitting = [case for case in cases if case.cache_bytes <= arguments.most_bytes]
    result = bench_attention(fitting, threads=arguments.threads, min_seconds=arguments.seconds)
    path = RESULTS / f"attention-{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


def half_precision() -> list[Shape]:
    """float16 storage at one length each."""
    heads = (32, 32, 8, 128)
    return [Shape(Phase.DECODE, 1, *heads, 8192, "float16"), Shape(Phase.PREFILL, 1, *heads, 2048, "float16")]


if __name__ == "__main__":
    main()
