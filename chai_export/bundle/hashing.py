"""SHA-256 of files, computed once per content: remembered by inode, size and modification time.

The memory lies in the user's cache directory and not in the bundle, so a read-only bundle is served too,
and a bundle that was renamed after writing is not hashed again. Losing it only costs time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from chai_export.bundle.atomic import atomic_file
from chai_export.errors import ChaiError
from chai_export.files import open_file, read_json

_BLOCK = 1 << 22
_MOST_ENTRIES = 4096
# Modification times move in ticks of a few milliseconds. A file changed within this time might change once
# more without a new time stamp, so its hash is not remembered yet.
_SETTLED_NS = 50_000_000

_known: dict[str, list[int | str]] = {}


def cache_path() -> Path:
    """The file that remembers hashes: ``$XDG_CACHE_HOME/chai_export/hashes.json``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # unset, or to be passed over as its specification says
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "chai_export" / "hashes.json"


def has_sha256(path: Path, expected: str) -> bool:
    """Whether a file has this SHA-256. A remembered one that differs may be wrong: then the file is read.

    Raises:
        OSError: the file cannot be read.
    """
    return sha256_file(path) == expected or sha256_file(path, remembered=False) == expected


def sha256_file(path: Path, *, remembered: bool = True) -> str:
    """Lower-case hexadecimal SHA-256 of a file; read only if its size or modification time is new.

    Args:
        path: a regular file.
        remembered: False reads it in any case, and corrects what was remembered.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    key, stamp = f"{status.st_dev}:{status.st_ino}", [status.st_size, status.st_mtime_ns]
    if key not in _known:
        _known.update({k: v for k, v in _read_cache().items() if k not in _known})
    entry = _known.get(key)
    if remembered and entry is not None and entry[:2] == stamp:
        return str(entry[2])

    digest = _digest(path)
    if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
        _known[key] = [*stamp, digest]
        _write_cache()
    return digest


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _read_cache() -> dict[str, list[int | str]]:
    """What earlier runs remembered; entries of another form count as none, like a file that is damaged."""
    with suppress(ChaiError):
        return {k: v for k, v in read_json(cache_path(), fix="").items() if _is_entry(v)}
    return {}


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, list)
        and [type(part) for part in value] == [int, int, str]
        and re.fullmatch("[0-9a-f]{64}", value[2]) is not None
    )


def _write_cache() -> None:
    if not cache_path().is_absolute():  # a user without a home
        return
    # A process that finds another one writing leaves it at that: its hashes are only missing.
    with suppress(ChaiError, OSError), atomic_file(cache_path(), patience=0.05) as file:
        entries = {**_read_cache(), **_known}
        recent = dict(list(entries.items())[-_MOST_ENTRIES:])
        file.write_text(json.dumps(recent))
