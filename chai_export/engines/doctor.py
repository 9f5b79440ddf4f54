"""Probing this machine: each capability by a known answer where one is to be had, not by a version."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chai_export.errors import ChaiError, reason
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library

KNOWN_ANSWER_CASE = "mixed_phases_k8v4"
"""Fresh, continuing, padded and inactive rows in one call of the op, keys in 8 and values in 4 bits."""


@dataclass(frozen=True)
class Finding:
    """One check: what was found, whether it works, and the command that mends it otherwise."""

    name: str
    works: bool
    found: str
    fix: str = ""
    is_backend: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON object of ``doctor --json``."""
        return asdict(self)


def diagnose() -> list[Finding]:
    """All checks, the backends first."""
    return [
        _function_body(),
        _native_library(),
        _cuda_provider(),
        _tensorrt(),
        _gpu(),
        *(_package(name, fix) for name, fix in _PACKAGES.items()),
        Finding("python", True, platform.python_version()),
    ]


_PACKAGES = {
    "torch": "pip install torch",
    "transformers": "pip install transformers",
    "onnx": "pip install onnx",
    "onnxruntime": "pip install onnxruntime",
}


def _function_body() -> Finding:
    name = "onnxruntime, portable function body"
    try:
        answer = _known_answer(None)
    except Exception as error:
        return Finding(name, False, reason(error), "pip install --upgrade onnxruntime", is_backend=True)
    return Finding(name, True, answer, is_backend=True)


def _native_library() -> Finding:
    name = "onnxruntime, native library"
    fix = "install g++ and ONNX Runtime's headers, then pip install --force-reinstall --no-deps chai-export"
    library = find_library(ONNXRUNTIME_LIBRARY)
    if library is None:
        return Finding(
            name, False, f"lib{ONNXRUNTIME_LIBRARY}.so was not built; the function body is used", fix
        )
    try:
        answer = _known_answer(library)
    except Exception as error:
        return Finding(name, False, reason(error), fix, is_backend=True)
    return Finding(name, True, answer, is_backend=True)


def _cuda_provider() -> Finding:
    """Whether bundles with GPU kernels run on ONNX Runtime's CUDA provider; no model is run to find out."""
    import onnxruntime

    from chai_export.runtime.onnxruntime_gpu import require_cuda_gpu, require_provider

    name = "onnxruntime, CUDA"
    try:
        gpu = require_cuda_gpu()
        require_provider()
    except (ChaiError, OSError, AttributeError) as problem:
        found, _, fix = str(problem).partition("; ")
        return Finding(name, False, reason(found), fix)
    return Finding(name, True, f"onnxruntime {onnxruntime.__version__} on {gpu.target}, {_compiler()}")


def _compiler() -> str:
    """What ``build --gpu`` compiles with."""
    try:
        return f"triton {importlib.metadata.version('triton')} compiles its kernels"
    except importlib.metadata.PackageNotFoundError:
        return "kernels are to be compiled elsewhere: no triton here (pip install triton)"


def _tensorrt() -> Finding:
    """Whether engines can be built and run here; nothing is built to find out."""
    from chai_export.runtime.tensorrt_environment import (
        import_polygraphy,
        import_tensorrt,
        require_gpu,
        require_plugin,
    )

    name = "tensorrt, plugin"
    try:
        tensorrt = import_tensorrt()
        import_polygraphy()
        gpu = require_gpu()
        library = require_plugin(tensorrt)
    except ChaiError as problem:
        found, _, fix = str(problem).partition("; ")
        return Finding(name, False, reason(found), fix)
    return Finding(name, True, f"TensorRT {tensorrt.__version__} with {library.name} on {gpu.name}")


def _known_answer(library: Path | None) -> str:
    """Run one case of the op in ONNX Runtime, by a library or the function body, against the reference.

    Raises:
        AssertionError: the answer is wrong. Anything ONNX Runtime raises passes through.
    """
    import onnxruntime

    from chai_export.op.cases import CACHES, CASES, check
    from chai_export.op.model import node_model
    from chai_export.op.reference import AttentionResult

    case = next(case for case in CASES if case.name == KNOWN_ANSWER_CASE)
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    model = node_model(case.attributes, "float32", with_function=library is None)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = case.inputs()
    names = ["output", *(f"present_{name}" for name in CACHES), "present_head_map"]
    check(case, inputs, AttentionResult(*session.run(names, inputs)))
    return f"onnxruntime {onnxruntime.__version__} gives the known answer"


def _gpu() -> Finding:
    fix = "install NVIDIA's driver; everything on ONNX Runtime's CPU provider works without a GPU"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("GPU", False, "no nvidia-smi", fix)
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        return Finding("GPU", False, reason(answer.stderr or "nvidia-smi lists none"), fix)
    return Finding("GPU", True, "; ".join(lines))


def _package(name: str, fix: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", fix)
