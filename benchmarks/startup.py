"""How long each command takes to its first answer, with files cold and warm.

    python benchmarks/startup.py NAME BUNDLE [--repeats 5]   # results/startup-NAME.json; NAME of the machine

Warm is the fastest of some runs in a row. Cold is a run after the pages of the package, of its libraries
and of the bundle have been dropped from the page cache, by posix_fadvise: no root is needed, and files that
another process has mapped stay. Counted is the time to the first byte of output, for ``run`` its first token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from time import perf_counter

from chai_export.bench import machine

PROMPT = "The first token"


def main() -> None:
    """Measure every command and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the machine, such as milan-2")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    bundle = str(arguments.bundle)
    commands = {
        "run": ["run", bundle, "--prompt", PROMPT, "--max-new-tokens", "1", "--stream"],
        "inspect": ["inspect", bundle],
        "doctor": ["doctor"],
        "--help": ["--help"],
    }
    times = {}
    for name, command in commands.items():
        drop_pages(
            [Path(sysconfig.get_path("purelib")), Path(sys.prefix), arguments.bundle, *map(Path, sys.path)]
        )
        cold = seconds(command)
        warm = min(seconds(command) for _ in range(arguments.repeats))
        times[name] = {"cold_s": round(cold, 3), "warm_s": round(warm, 3)}
        print(f"{name:10} cold {cold:6.2f} s, warm {warm:6.2f} s", flush=True)
    result = {"machine": machine.describe(), "bundle": arguments.bundle.name, "commands": times}
    path = Path(__file__).parent / "results" / f"startup-{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


def seconds(command: list[str]) -> float:
    """Wall time from the start of a process to the first byte on its standard output."""
    began = perf_counter()
    program = [sys.executable, "-m", "chai_export", *command]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        took = perf_counter() - began
        _, problem = process.communicate()
    if process.returncode or not first:
        raise SystemExit(f"{' '.join(command)} failed: {problem.decode()[-300:]}")
    return took


def drop_pages(folders: list[Path]) -> None:
    """Ask the kernel to forget what it has read of the files below ``folders``."""
    for folder in {each.resolve() for each in folders if each.is_dir()}:
        for file in folder.rglob("*"):
            if not file.is_file():
                continue
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError:
                continue
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
