"""What a benchmark ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

from chai_export.progress import note

_WAIT_POLICY = "OMP_WAIT_POLICY"


def let_idle_threads_sleep() -> None:
    """Keep torch's idle threads from taking the cores of whatever is timed next.

    OpenMP's threads spin for milliseconds after a parallel region unless this is set before torch is loaded;
    whoever set it otherwise is left alone.
    """
    if os.environ.get(_WAIT_POLICY):
        return
    if "torch" in sys.modules:
        note(f"torch is loaded already and its idle threads may spin; set {_WAIT_POLICY}=PASSIVE beforehand")
    else:
        os.environ[_WAIT_POLICY] = "PASSIVE"


def describe() -> dict[str, str | int]:
    """Date, processor, cores that this process may use, and versions of what was measured."""
    import onnxruntime
    import torch

    found: dict[str, str | int] = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": platform.platform(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "idle_openmp_threads": os.environ.get(_WAIT_POLICY, "default").lower(),
    }
    if importlib.util.find_spec("onnxruntime_genai") is not None:
        found["onnxruntime_genai"] = importlib.metadata.version("onnxruntime-genai")
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def read_bandwidth(threads: int, megabytes: int = 1024, rounds: int = 7) -> float:
    """GB/s at which all threads together read memory: the best of a few sums over a large buffer."""
    import torch

    torch.set_num_threads(threads)
    buffer = torch.from_numpy(np.ones(megabytes << 18, dtype=np.float32))
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - begin)
    return buffer.nbytes / best / 1e9
