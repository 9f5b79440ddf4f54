"""Names of files in a manifest: they stay inside the bundle, however they are written or linked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from chai_export.errors import ChaiError


def _stays_inside(name: str) -> str:
    """``name`` itself: a relative path with forward slashes, without empty parts, ``.`` and ``..``."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is no path inside the bundle")
    return name


FileName = Annotated[str, AfterValidator(_stays_inside)]
"""A path relative to the bundle."""


def require_inside(root: Path, path: Path) -> None:
    """Raise unless ``path`` lies below ``root`` after all links are followed.

    Raises:
        ChaiError: it does not.
        OSError: a link cannot be followed.
    """
    real = Path(os.path.realpath(path, strict=True))
    if not real.is_relative_to(os.path.realpath(root, strict=True)):
        raise ChaiError(f"{path} is a link that leads out of the bundle; copy the bundle with `cp -rL`")
