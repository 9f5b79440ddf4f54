"""The GPU that ONNX Runtime's CUDA provider computes on, and the kernels that a bundle has for it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort

from chai_export.bundle.bundle import ENGINES_DIRECTORY, Bundle, check_files
from chai_export.bundle.choices import Backend
from chai_export.errors import ChaiError
from chai_export.progress import note
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library

PROVIDER = "CUDAExecutionProvider"
KERNELS = f"{ENGINES_DIRECTORY}/{Backend.ONNXRUNTIME}/kernels"
"""Of a bundle: a directory for each architecture, in it one for each form of storage."""
INSTALL = "pip uninstall -y onnxruntime; pip install 'chai-export[gpu]'"


class CacheDevice(Protocol):
    """Where the session of a GPU has its caches."""

    @property
    def provider(self) -> str:
        """ONNX Runtime's, which computes there."""
        ...

    @property
    def device(self) -> str:
        """ONNX Runtime's word for its memory."""
        ...

    @property
    def kernels(self) -> Path:
        """Directory of kernels by architecture."""
        ...

    def free_memory(self) -> int:
        """Bytes that can be had."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes between addresses of its memory."""
        ...


@dataclass(frozen=True)
class CudaGpu:
    """The first GPU that CUDA shows, through the op's library: nothing else is needed to ask it.

    ``architecture`` is its compute capability as a number, 90 for 9.0.
    """

    library: Any
    architecture: int
    kernels: Path = Path()
    provider: str = PROVIDER
    device: str = "cuda"

    @property
    def target(self) -> str:
        """Name of the architecture: ``sm_90``."""
        return f"sm_{self.architecture}"

    def free_memory(self) -> int:
        """Bytes that can be had."""
        return _ask(self.library)[1]

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes between addresses of its memory.

        Raises:
            ChaiError: CUDA does not.
        """
        problem = self.library.chai_gpu_copy(
            ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size)
        )
        if problem is not None:
            raise ChaiError(f"a page of the cache cannot be copied on the GPU ({problem.decode()})")


def require_cuda_gpu() -> CudaGpu:
    """The GPU, whatever ONNX Runtime can do with it.

    Raises:
        ChaiError: the op's library is missing or was compiled without CUDA; there is no GPU or driver.
    """
    path = find_library(ONNXRUNTIME_LIBRARY)
    if path is None:
        raise ChaiError(
            f"lib{ONNXRUNTIME_LIBRARY}.so was not built; install g++ and a CUDA toolkit, then "
            "pip install --force-reinstall --no-deps chai-export"
        )
    library = ctypes.CDLL(str(path))
    library.chai_gpu.restype = library.chai_gpu_copy.restype = ctypes.c_char_p
    return CudaGpu(library, _ask(library)[0])


def require_provider() -> None:
    """Raise unless ONNX Runtime has a CUDA provider.

    Raises:
        ChaiError: it is a build for CPUs.
    """
    if PROVIDER not in ort.get_available_providers():
        raise ChaiError(f"onnxruntime {ort.__version__} has no {PROVIDER}; {INSTALL}")


def gpu_for(bundle: Bundle) -> CudaGpu | None:
    """The GPU to run a bundle on; None where there is none, or nothing to compute with.

    Raises:
        ChaiError: the bundle's kernels are for other GPUs, or were changed.
    """
    try:
        require_provider()
        gpu = require_cuda_gpu()
    except ChaiError:
        return None
    build = f"`chai-export build {bundle.path} --backend {Backend.ONNXRUNTIME} --gpu`"
    record = bundle.manifest.engines.get(Backend.ONNXRUNTIME)
    if record is None or not record.files:
        note(f"{bundle.path} has no kernels for the GPU here and runs on the CPU; {build} compiles them")
        return None
    targets = sorted({name.removeprefix(f"{KERNELS}/").split("/")[0] for name in record.files})
    if gpu.target not in targets:
        raise ChaiError(
            f"{bundle.path} has GPU kernels for {', '.join(targets)} and this GPU is {gpu.target}; "
            f"run {build}"
        )
    check_files(bundle.path, record.files, again=f"run {build} again")
    return CudaGpu(gpu.library, gpu.architecture, (bundle.path / KERNELS).resolve())


def _ask(library: Any) -> tuple[int, int]:
    """Architecture and bytes of free memory.

    Raises:
        ChaiError: there is no GPU that CUDA can use.
    """
    architecture, free, total = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t()
    problem = library.chai_gpu(ctypes.byref(architecture), ctypes.byref(free), ctypes.byref(total))
    if problem is not None:
        raise ChaiError(f"there is no GPU to compute on ({problem.decode()}); install NVIDIA's driver")
    return architecture.value, free.value
