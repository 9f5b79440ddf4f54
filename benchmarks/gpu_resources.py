"""Registers, spills, shared memory and cubin sizes of every kernel, as the compiler reports them.

Needs no GPU.

    python benchmarks/gpu_resources.py            # compile everything, compare with the recorded figures
    python benchmarks/gpu_resources.py --record   # and write them

The record is a regression figure: ``tests/parity/test_triton_compile.py`` compares part of it in CI and
all of it when slow tests are asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chai_export.kernels import Spec, compile

RECORD = Path(__file__).parent / "results" / "gpu-kernel-resources.json"

SPECS = {
    "small": Spec(4, 2, 32, 32, "float16", key_bits=8, value_bits=4),
    "llama-7b": Spec(32, 32, 128, 128, "bfloat16"),
    "llama-7b-8-8": Spec(32, 32, 128, 128, "bfloat16", key_bits=8, value_bits=8),
    "llama-7b-8-4": Spec(32, 32, 128, 128, "bfloat16", key_bits=8, value_bits=4),
    "grouped": Spec(32, 8, 64, 64, "float16", key_bits=8, value_bits=4),
    "multi-query": Spec(128, 1, 256, 256, "bfloat16", probe_tokens=16),
    "float32": Spec(32, 8, 128, 128, "float32"),
    "odd-4-4": Spec(25, 5, 80, 112, "float16", key_bits=4, value_bits=4, group_size=16),
}

EVERYWHERE = [80, 89, 90, 100, 120]


def recorded_architectures(name: str) -> list[int]:
    """The usual model in few bits everywhere; the others where shared memory is plenty."""
    return EVERYWHERE if name == "llama-7b-8-4" else [90]


def measure(name: str, arch: int, kernels: list[str]) -> tuple[str, dict[str, Any]]:
    """Triton version and, per kernel, what the compiler reports."""
    with tempfile.TemporaryDirectory() as folder:
        index = json.loads(compile(SPECS[name], arch, folder, only=kernels).read_text())
    report = {
        launch["kernel"]: launch["resources"] | {"shared_bytes": launch["shared_bytes"]}
        for launch in index["launches"]
    }
    return index["triton"], report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write the figures")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--specs", default=",".join(SPECS), help="names, separated by commas")
    parser.add_argument("--kernels", default="", help="kernel names, separated by commas (default: all)")
    arguments = parser.parse_args()
    kernels = arguments.kernels.split(",") if arguments.kernels else []
    tasks = [(name, arch) for name in arguments.specs.split(",") for arch in recorded_architectures(name)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        measured = list(pool.map(lambda task: measure(*task, kernels), tasks))
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {"figures": {}}
    changed = 0
    for (name, arch), (_, report) in zip(tasks, measured, strict=True):
        old = recorded["figures"].get(name, {}).get(f"sm_{arch}")
        for kernel, figures in report.items():
            registers, spilled = figures["registers"], figures["spill_store_bytes"]
            note = "" if old is None or old.get(kernel) == figures else f"  recorded {old.get(kernel)}"
            changed += bool(note)
            print(
                f"{name:12} sm_{arch:<4} {kernel:22} {registers:4} registers {spilled:5} B spilled "
                f"{figures['shared_bytes']:7} B shared {figures['cubin_bytes']:7} B{note}"
            )
        recorded["figures"].setdefault(name, {}).setdefault(f"sm_{arch}", {}).update(report)
    if arguments.record:
        specs = {name: asdict(spec) for name, spec in SPECS.items()}
        recorded = {"triton": measured[0][0], "specs": specs, "figures": recorded["figures"]}
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(recorded, indent=1) + "\n")
    return 1 if changed and not arguments.record else 0


if __name__ == "__main__":
    sys.exit(main())
