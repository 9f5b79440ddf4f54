"""Native sources built for tests: a folder per configuration, kept, so that only changes are compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("cmake", "ctest", "g++")

needs_tools = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)) and "CI" not in os.environ, reason=f"needs {', '.join(TOOLS)}"
)


def run(*command: object, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run a command in the source tree's root, with changes to the environment; None removes a variable."""
    changed = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=changed,
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(*command: object, **environment: str | None) -> str:
    """What a command prints; a test failure with its output if it fails."""
    done = run(*command, **environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(configuration: str, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """Configure ``build/<configuration>``, build the targets (all without any) and return the folder."""
    folder = ROOT / "build" / configuration
    succeed("cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options)
    only = ("--target", *targets) if targets else ()
    succeed("cmake", "--build", folder, "--parallel", os.cpu_count() or 1, *only)
    return folder
