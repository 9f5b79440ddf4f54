"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import numpy as np


def describe() -> dict[str, str | int]:
    """Processor, cores that this process may use, and versions of what was measured."""
    import onnxruntime
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": platform.platform(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


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
