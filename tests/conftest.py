"""Settings that must be in place before any test module is imported."""

from __future__ import annotations

import os
from pathlib import Path

GPU_DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))

# Triton reads this when it is first imported, by whichever test comes first: without a GPU the kernels' tests
# run in its interpreter.
if not any(file.exists() for file in GPU_DEVICE_FILES):
    os.environ.setdefault("TRITON_INTERPRET", "1")
