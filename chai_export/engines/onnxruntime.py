"""The ONNX Runtime "engine": proof that the bundle runs here, limits for its runs, and GPU kernels if asked.

ONNX Runtime could write its optimised graph, and starting from it would save a second or so. It is left out
on purpose: written with the native library registered it lacks the function body, written without it the
body is inlined and the library's kernel is never used again. Either way the bundle would be tied to whether
one file is present, for little. The record holds no library either, so the same bundle runs with and
without it.

Kernels for the CUDA provider lie in ``engines/onnxruntime/kernels``, by architecture and form of storage.
They are compiled without a GPU, and stay when the bundle is built again for other limits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from chai_export.bundle.atomic import atomic_directory
from chai_export.bundle.bundle import MODEL_FILE, Bundle, record_files
from chai_export.bundle.choices import Backend, Heads
from chai_export.bundle.manifest import EngineRecord, FileRecord
from chai_export.bundle.parts import ENGINE
from chai_export.engines.proof import prove_engine
from chai_export.engines.tensorrt_network import specs
from chai_export.errors import ChaiError, UsageError
from chai_export.kernels.ahead_of_time import compile as compile_kernels
from chai_export.kernels.blocks import architectures
from chai_export.op.schema import SHARED_OP_TYPE
from chai_export.progress import note
from chai_export.runtime.onnxruntime_gpu import KERNELS, CudaGpu, require_cuda_gpu, require_provider
from chai_export.runtime.onnxruntime_gpu_session import OnnxRuntimeGpuSession
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.session import Session
from chai_export.version import CREATED_WITH

HERE = "here"
_ARCHITECTURES = "gpu_architectures"


def build_onnxruntime(
    bundle: Bundle, max_batch: int, max_seq: int, cache_memory: int | None = None, gpu: str | None = None
) -> EngineRecord:
    """Load the bundle, run one step at the largest batch, and return the record of it.

    Args:
        bundle: what to build.
        max_batch: most rows of a step.
        max_seq: most tokens of a row.
        cache_memory: bytes that caches may take, so that rows wait for each other.
        gpu: architectures to compile kernels for, see :func:`chai_export.engines.build.build`.

    Raises:
        UsageError: ``gpu`` names what there are no kernels for.
        ChaiError: ONNX Runtime cannot run the bundle, its result is not finite, caches of ``max_batch`` ×
            ``max_seq`` tokens do not fit in memory, or one row of them in ``cache_memory``; kernels cannot be
            compiled for it.
    """
    wanted = None if gpu is None else _architectures(gpu)
    manifest = bundle.manifest
    rows = max_batch if cache_memory is None else 1  # the others may wait
    session = OnnxRuntimeSession(bundle, Heads.CHAI, cache_memory=cache_memory)
    _prove(session, bundle, rows, max_seq)
    session.drop()
    before = manifest.engines.get(Backend.ONNXRUNTIME)
    kept = before is not None and before.model_sha256 == manifest.files[MODEL_FILE].sha256
    files = before.files if before is not None and kept else {}
    settings = before.settings if before is not None and kept else {}
    if wanted is not None:
        files = _compile(bundle, wanted, rows, max_seq, cache_memory)
        settings = {_ARCHITECTURES: ",".join(f"sm_{number}" for number in wanted)}
    return EngineRecord(
        backend=Backend.ONNXRUNTIME,
        runtime_version=ort.__version__,
        model_sha256=manifest.files[MODEL_FILE].sha256,
        max_batch=max_batch,
        max_seq=max_seq,
        op_version=manifest.op_version,
        files=files,
        settings=settings,
        created_with=CREATED_WITH,
    )


def _prove(session: Session, bundle: Bundle, rows: int, max_seq: int) -> None:
    """One step at the largest batch, with caches for the longest rows."""
    session.begin(rows, max_seq)
    tokens = min(bundle.manifest.probe_tokens + 1, max_seq)
    logits = session.step(
        np.zeros((rows, tokens), np.int64),
        np.full(rows, tokens, np.int32),
        np.zeros(rows, np.int32),
        np.full((rows, 1), tokens - 1, np.int64),
    )
    if not np.isfinite(logits).all():
        raise ChaiError(f"{bundle.model_path} gives logits that are not finite; export with --dtype float32")


def _architectures(words: str) -> list[int]:
    """Compute capabilities that ``--gpu`` names."""
    known = architectures()
    if words == HERE:
        try:
            return [require_cuda_gpu().architecture]
        except ChaiError as error:
            raise ChaiError(
                f"{error}, or name what to compile for, such as --gpu sm_{known[-1]}; none of it needs a GPU"
            ) from error
    found = []
    for word in words.split(","):
        number = re.fullmatch(r"(?:sm_)?(\d+)", word.strip())
        if number is None or int(number[1]) not in known:
            names = ", ".join(f"sm_{number}" for number in known)
            raise UsageError(f"--gpu is {words!r}; give some of {names}, with commas between")
        found.append(int(number[1]))
    return sorted(set(found))


def _compile(
    bundle: Bundle, wanted: Sequence[int], rows: int, max_seq: int, cache_memory: int | None
) -> dict[str, FileRecord]:
    """Compile kernels into the bundle, and prove those for the GPU that is here."""
    if bundle.manifest.kv_source_layers is not None:
        raise ChaiError(
            f"{bundle.path} has layers that read another layer's KV cache, and {SHARED_OP_TYPE} has no GPU "
            "kernels; leave --gpu out"
        )
    forms = specs(bundle)
    place = bundle.path / KERNELS
    with atomic_directory(place.parent, ENGINE) as directory:
        kernels = directory / place.name
        for architecture in wanted:
            note(f"compiling {len(forms)} forms of kernels for sm_{architecture}")
            for form, spec in forms.items():
                compile_kernels(spec, architecture, kernels / f"sm_{architecture}" / form)
        gpu = _gpu_here(wanted, kernels)
        if gpu is not None:
            device = gpu
            prove_engine(
                bundle,
                lambda heads: OnnxRuntimeGpuSession(bundle, heads, device, cache_memory=cache_memory),
                rows,
                max_seq,
            )
        parent = place.parent.relative_to(bundle.path).as_posix()
        return {f"{parent}/{name}": record for name, record in record_files(directory, directory).items()}


def _gpu_here(wanted: Sequence[int], kernels: Path) -> CudaGpu | None:
    """The GPU that a proof can run on, if it is one of those compiled for."""
    try:
        require_provider()
        gpu = require_cuda_gpu()
    except ChaiError:
        return None
    if gpu.architecture not in wanted:
        return None
    return CudaGpu(gpu.library, gpu.architecture, kernels.resolve())
