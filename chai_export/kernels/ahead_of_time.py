"""Cubins and their index, made on a machine without a GPU: what the TensorRT plugin launches.

Compilation runs in a process of its own with a clean environment and an empty cache, so that neither the
caller's settings nor its folders reach the bytes: equal sources and versions give equal files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chai_export.errors import ChaiError, last_line
from chai_export.kernels.blocks import architectures
from chai_export.kernels.spec import Spec

INDEX_NAME = "index.json"
FORMAT = "chai-kernels/2"
"""Of the index; its number is the op's version."""

# Line info would put folder names into the cubins; fusion's default changes between Triton versions.
PINNED_ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT")


def compile(spec: Spec, arch: int, directory: str | Path, *, only: Sequence[str] = ()) -> Path:
    """Compile every kernel of a model for one architecture.

    Args:
        spec: a layer's constants; R, C, B and S stay run-time values, so that layers share the result.
        arch: compute capability as a number, 90 for sm_90. The cubins run on exactly this architecture.
        directory: receives one ``<kernel>.cubin`` per kernel and ``index.json`` (``docs/kernels.md``
            describes it). Created if needed; files of the same names are replaced, the index last.
        only: kernel names to compile instead of all (tests); the index then lists only these.

    Returns:
        Path of the index.

    Raises:
        ChaiError: an architecture without block sizes, Triton not installed, or a compiler failure.
    """
    if arch not in architectures():
        known = ", ".join(str(number) for number in architectures())
        raise ChaiError(f"no GPU kernels for sm_{arch}; choose one of {known}")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chai-kernels-") as scratch:
        request = {
            "spec": asdict(spec),
            "arch": arch,
            "directory": scratch,
            "only": list(only),
        }
        _run_worker(request, scratch)
        index: dict[str, Any] = json.loads((Path(scratch) / INDEX_NAME).read_text())
        for launch in index["launches"]:
            _replace(Path(scratch) / launch["file"], target / launch["file"])
        _replace(Path(scratch) / INDEX_NAME, target / INDEX_NAME)
    return target / INDEX_NAME


def _run_worker(request: dict[str, Any], scratch: str) -> None:
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    environment |= PINNED_ENVIRONMENT
    environment["TRITON_CACHE_DIR"] = str(Path(scratch) / "cache")
    # The child uses this very copy of the package (-S: no import hooks of an editable install) and finds
    # all others where this process does.
    package_parent = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([package_parent, *(entry for entry in sys.path if entry)])
    command = [sys.executable, "-S", "-m", "chai_export.kernels.compile_worker"]
    done = subprocess.run(
        command, input=json.dumps(request), text=True, capture_output=True, env=environment, check=False
    )
    if done.returncode:
        raise ChaiError(
            f"compiling the GPU kernels for sm_{request['arch']} failed: {last_line(done.stderr)}; "
            "install triton>=3.6 (pip install 'chai-export[gpu]') or choose another architecture"
        )


def _replace(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.write_bytes(source.read_bytes())
    partial.replace(target)
