"""What lies in a folder, to be compared before and after."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def snapshot(folder: Path) -> dict[str, object]:
    """Every entry below a folder, hidden ones too: its content, where it leads, or its kind."""
    return {path.relative_to(folder).as_posix(): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> object:
    if path.is_symlink():
        return ("link", os.readlink(path))
    if path.is_file():
        return path.read_bytes()
    return stat.S_IFMT(path.stat().st_mode)
