"""Finding the compiled libraries that lie inside the package directory."""

from __future__ import annotations

import os
from pathlib import Path

import chai_export

ONNXRUNTIME_LIBRARY = "chai_onnxruntime"
SWITCH = "CHAI_EXPORT_NATIVE"


def find_library(name: str) -> Path | None:
    """Path of the compiled library ``lib<name>.so`` of this package, None if it was not built.

    ``CHAI_EXPORT_NATIVE=0`` in the environment hides all of them, so that bundles run on their function body.
    """
    if native_is_off():
        return None
    path = Path(chai_export.__file__).parent / f"lib{name}.so"
    return path if path.is_file() else None


def native_is_off() -> bool:
    """Whether the environment hides the compiled libraries."""
    return os.environ.get(SWITCH) == "0"
