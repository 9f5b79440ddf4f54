"""What building and running TensorRT engines needs of a machine, each with the line that mends it."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chai_export.errors import ChaiError
from chai_export.op.schema import DOMAIN, OP_TYPE
from chai_export.op.signature import VERSION
from chai_export.runtime.native import SWITCH, find_library, native_is_off

TENSORRT_LIBRARY = "chai_tensorrt"
LEAST_TENSORRT = (10, 3)
PLUGIN_VERSION = str(VERSION)
PLUGIN_NAMESPACE = DOMAIN
HELD_AS = {"uint8": "int8"}
"""Types of caches that TensorRT has under another name: it passes UINT8 to casts alone, and to a plugin the
bytes of INT8 as they are."""
INSTALL = "pip install 'chai-export[tensorrt]'"


@dataclass(frozen=True)
class Gpu:
    """A CUDA device. ``architecture`` is its compute capability as a number, 90 for 9.0."""

    name: str
    architecture: int
    driver: str

    @property
    def target(self) -> str:
        """Name of the architecture in records and messages: ``sm_90``."""
        return f"sm_{self.architecture}"


def import_tensorrt() -> Any:
    """The ``tensorrt`` module.

    Raises:
        ChaiError: it is not installed, does not load, or is older than 10.3.
    """
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise ChaiError(f"TensorRT cannot be imported ({error}); {INSTALL}") from error
    if version_of(tensorrt) < LEAST_TENSORRT:
        raise ChaiError(
            f"TensorRT is {tensorrt.__version__} and "
            f"{'.'.join(map(str, LEAST_TENSORRT))} or newer is needed; {INSTALL}"
        )
    return tensorrt


def version_of(tensorrt: Any) -> tuple[int, int]:
    """Major and minor version of a tensorrt module."""
    major, minor = str(tensorrt.__version__).split(".")[:2]
    return int(major), int(minor)


def import_polygraphy() -> Any:
    """The ``polygraphy.backend.trt`` module.

    Raises:
        ChaiError: polygraphy is not installed.
    """
    try:
        return importlib.import_module("polygraphy.backend.trt")
    except ImportError as error:
        raise ChaiError(f"polygraphy cannot be imported ({error}); {INSTALL}") from error


def require_gpu() -> Gpu:
    """The current CUDA device.

    Raises:
        ChaiError: torch is a build without CUDA, or there is no device or driver.
    """
    import torch

    if torch.version.cuda is None:
        raise ChaiError(
            f"torch {torch.__version__} is a build without CUDA; install one that has it: "
            "pip install --force-reinstall torch"
        )
    if not torch.cuda.is_available():
        raise ChaiError(
            "there is no CUDA GPU or its driver is not installed; TensorRT engines are built and run on the "
            "GPU they are for, use --backend onnxruntime here"
        )
    device = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(torch.cuda.get_device_name(device), 10 * major + minor, _driver(device))


def _driver(device: int) -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device}"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.strip() or "unknown"


def require_plugin(tensorrt: Any) -> Path:
    """Load the plugin library and return its path.

    Raises:
        ChaiError: ``CHAI_EXPORT_NATIVE=0`` forbids it, it was not built, was built for another major version
            of TensorRT, or does not register.
    """
    if native_is_off():
        raise ChaiError(
            f"{SWITCH}=0 leaves native code out, and TensorRT engines have no attention without the plugin; "
            "unset it, or use --backend onnxruntime"
        )
    major = version_of(tensorrt)[0]
    rebuild = (
        f"set TensorRT_ROOT to the headers of TensorRT {major}, then "
        "pip install --force-reinstall --no-deps chai-export"
    )
    library = find_library(TENSORRT_LIBRARY)
    if library is None:
        raise ChaiError(f"lib{TENSORRT_LIBRARY}.so was not built; {rebuild}")
    try:
        compiled_for = int(ctypes.CDLL(str(library)).chai_tensorrt_major())
    except (OSError, AttributeError) as error:
        raise ChaiError(f"{library} does not load ({error}); {rebuild}") from error
    if compiled_for != major:
        raise ChaiError(
            f"{library} was compiled for TensorRT {compiled_for} and {tensorrt.__version__} is installed; "
            f"{rebuild}"
        )
    registry = tensorrt.get_plugin_registry()
    registered = registry.get_creator(OP_TYPE, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None
    # It registers by itself when it is first loaded; after somebody took that back, the registry does it.
    if not registered and registry.load_library(str(library)) is None:
        raise ChaiError(
            f"{library} loads but registers no plugin in TensorRT {tensorrt.__version__}; {rebuild}"
        )
    return library
