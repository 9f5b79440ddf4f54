"""Giving a new directory the name of an old one, so that whoever looks the name up finds one of them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def put_in_place(new: Path, target: Path, aside: Path) -> None:
    """Make ``new`` appear as ``target``; what was there before is then at ``new`` or at ``aside``.

    Where the file system cannot exchange two names, ``target`` is missing for a moment. Whoever is stopped in
    it leaves the earlier content at ``aside``, from where :mod:`~chai_export.bundle.work_directory` restores
    it.

    Raises:
        OSError: the directory cannot be renamed.
    """
    if not os.path.lexists(target):
        os.rename(new, target)
    elif not exchange(new, target):
        os.rename(target, aside)
        os.rename(new, target)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False, and nothing done, where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library that does not know the call
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
