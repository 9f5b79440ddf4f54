"""SHA-256 of files, computed once per content: remembered by inode, size and modification time.

The memory lies in the user's cache directory and not in the bundle, so a read-only bundle is served too,
and a bundle that was renamed after writing is not hashed again. Losing it only costs time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from chai_export.bundle.atomic import atomic_file
from chai_export.errors import ChaiError

_BLOCK = 1 << 22
_MOST_ENTRIES = 4096
# Modification times move in ticks of a few milliseconds. A file changed within this time might change once
# more without a new time stamp, so its hash is not remembered yet.
_SETTLED_NS = 50_000_000

_known: dict[str, list[int | str]] = {}


def cache_path() -> Path:
    """The file that remembers hashes: ``$XDG_CACHE_HOME/chai_export/hashes.json``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "chai_export" / "hashes.json"


def sha256_file(path: Path) -> str:
    """Lower-case hexadecimal SHA-256 of a file; read only if its size or modification time is new.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    key, stamp = f"{status.st_dev}:{status.st_ino}", [status.st_size, status.st_mtime_ns]
    if key not in _known:
        _known.update({k: v for k, v in _read_cache().items() if k not in _known})
    entry = _known.get(key)
    if entry is not None and entry[:2] == stamp:
        return str(entry[2])

    digest = _digest(path)
    if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
        _known[key] = [*stamp, digest]
        _write_cache()
    return digest


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _read_cache() -> dict[str, list[int | str]]:
    with suppress(OSError, ValueError):
        content = json.loads(cache_path().read_text())
        if isinstance(content, dict):
            return {k: v for k, v in content.items() if isinstance(v, list) and len(v) == 3}
    return {}


def _write_cache() -> None:
    entries = {**_read_cache(), **_known}
    recent = dict(list(entries.items())[-_MOST_ENTRIES:])
    with suppress(ChaiError, OSError), atomic_file(cache_path()) as file:
        file.write_text(json.dumps(recent))
