"""A GPU for tests of ONNX Runtime's session on one: the host's memory, the CPU provider."""

from __future__ import annotations

import ctypes
from pathlib import Path


class HostGpu:
    """``copies`` counts pages copied, one for each pool."""

    provider = "CPUExecutionProvider"
    device = "cpu"

    def __init__(self, kernels: Path = Path("nowhere"), memory: int = 1 << 30) -> None:
        self.kernels = kernels
        self.memory = memory
        self.copies = 0

    def free_memory(self) -> int:
        return self.memory

    def copy(self, target: int, source: int, size: int) -> None:
        self.copies += 1
        ctypes.memmove(target, source, size)
