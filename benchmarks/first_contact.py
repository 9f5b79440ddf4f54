"""First contact with a GPU, in one command: every step in a process of its own, one report of all.

    python benchmarks/first_contact.py                # or `make gpu`, which installs what it needs first
    python benchmarks/first_contact.py --only plugin engine-tensorrt --output somewhere

Writes first-contact.json and first-contact.txt anew after each step, so that a step that hangs or takes the
process down costs itself only. Exit code 1 if a step failed; what a machine lacks is skipped, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JSON_FILE, TEXT_FILE = "first-contact.json", "first-contact.txt"
NOTHING_COLLECTED = 5
"""pytest's exit code where no test was run."""
_TAIL = 40
"""Lines of a failed step that the report keeps."""


@dataclass(frozen=True)
class Step:
    """A command; ``reports`` says that its last line of output is a JSON object for the report."""

    name: str
    what: str
    command: tuple[str, ...]
    minutes: float = 30
    reports: bool = False


@dataclass
class Outcome:
    """What became of a step: passed, failed or skipped."""

    name: str
    what: str
    outcome: str
    seconds: float
    detail: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def _pytest(*files: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "--no-header", *files)


def _contact(backend: str, dtype: str) -> tuple[str, ...]:
    return (sys.executable, "benchmarks/engine_contact.py", backend, "--dtype", dtype)


STEPS = (
    Step("doctor", "what this machine has", (sys.executable, "-m", "chai_export", "doctor")),
    Step("kernels", "the op's cases in Triton, and graphs", _pytest("tests/gpu/test_kernels_gpu.py")),
    Step("cubins", "kernels compiled ahead of time", _pytest("tests/gpu/test_cubins_gpu.py")),
    Step(
        "plugin", "TensorRT's plugin, caches at equal and separate addresses",
        _pytest("tests/gpu/test_tensorrt_gpu.py"),
    ),
    Step("engines", "TensorRT engines of tiny models", _pytest("tests/gpu/test_tensorrt_engine_gpu.py"), 60),
    Step(
        "engine-tensorrt", "the demo model on TensorRT, token by token as ONNX Runtime has it",
        _contact("tensorrt", "float32"), reports=True,
    ),
    Step(
        "engine-tensorrt-half", "likewise in float16", _contact("tensorrt", "float16"), reports=True,
    ),
    Step(
        "engine-onnxruntime", "the demo model on ONNX Runtime's CUDA provider",
        _contact("onnxruntime", "float32"), reports=True,
    ),
    Step("sdpa", "time against torch's attention", (sys.executable, "benchmarks/gpu.py"), 60),
)  # fmt: skip


def run_step(step: Step) -> Outcome:
    """Run one step to its end or its time."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            step.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=60 * step.minutes, check=False,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""
        output = said.decode(errors="replace") if isinstance(said, bytes) else said
        code, output = -1, f"{output}\nstopped after {step.minutes} minutes"
    except OSError as error:
        code, output = -1, str(error)
    lines = output.strip().splitlines()
    facts = _facts(lines) if step.reports else {}
    result = Outcome(step.name, step.what, "passed", round(time.perf_counter() - began, 1), facts=facts)
    if "skipped" in facts:
        result.outcome, result.detail = "skipped", str(facts.pop("skipped"))
    elif code == NOTHING_COLLECTED or (code == 0 and _only_skips(lines)):
        reasons = [line for line in lines if line.startswith("SKIPPED")]
        result.outcome, result.detail = "skipped", "\n".join(reasons[:3] or lines[-1:])
    elif code == 0:
        result.detail = "" if step.reports else "\n".join(lines[-_TAIL:])
    else:
        result.outcome, result.detail = "failed", "\n".join([*lines[-_TAIL:], f"exit code {code}"])
    return result


def _facts(lines: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _only_skips(lines: Sequence[str]) -> bool:
    """Whether the output is that of a pytest that skipped everything."""
    return any(line.startswith("SKIPPED") for line in lines) and not any(
        set(line.split("[")[0].strip()) & set(".FE") for line in lines if line.rstrip().endswith("%]")
    )


def write_report(directory: Path, outcomes: Sequence[Outcome]) -> None:
    """Both files, each in one step."""
    machine = {"python": platform.python_version(), "system": platform.platform()}
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report = {"format": "chai-first-contact/1", "when": when, "machine": machine}
    report["steps"] = [asdict(outcome) for outcome in outcomes]  # type: ignore[assignment]
    _write(directory / JSON_FILE, json.dumps(report, indent=1) + "\n")
    _write(directory / TEXT_FILE, report_text(outcomes))


def report_text(outcomes: Sequence[Outcome]) -> str:
    """A line for each step, then what each of them said."""
    lines = [f"{o.outcome:8} {o.seconds:8.1f} s  {o.name}: {o.what}" for o in outcomes]
    for outcome in outcomes:
        if outcome.detail or outcome.facts:
            lines += ["", f"--- {outcome.name} ({outcome.outcome})", *outcome.detail.splitlines()]
            lines += [f"{name}: {value}" for name, value in outcome.facts.items()]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def first_contact(steps: Sequence[Step], directory: Path) -> int:
    """Run the steps, and report after each; the exit code."""
    directory.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for step in steps:
        print(f"{step.name}: {step.what} …", flush=True)
        outcomes.append(run_step(step))
        last = outcomes[-1]
        print(f"  {last.outcome} after {last.seconds} s", flush=True)
        write_report(directory, outcomes)
    print(f"{directory / TEXT_FILE} has all of it")
    return int(any(outcome.outcome == "failed" for outcome in outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", help="(default: build/gpu)")
    arguments = parser.parse_args()
    steps = [step for step in STEPS if arguments.only is None or step.name in arguments.only]
    return first_contact(steps, arguments.output.resolve())


if __name__ == "__main__":
    sys.exit(main())
