"""Everything that may lie where a JSON file should be: wrong content of each kind, and what is no file."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

DEEP = 100_000

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"x":' * DEEP + b"1" + b"}" * DEEP,
    "just too deep": b'{"x":' + b"[" * 300 + b"]" * 300 + b"}",
    "huge integer": b'{"x": 1' + b"0" * 30 + b"}",
    "endless integer": b'{"x": ' + b"7" * 5000 + b"}",
    "huge float": b'{"x": 1e999}',
    "NaN": b'{"x": NaN}',
    "infinity": b'{"x": -Infinity}',
    "not UTF-8": b'{"x": "\xff\xfe"}',
    "UTF-16": '{"x": 1}'.encode("utf-16"),
    "half a surrogate pair": b'{"x": "\\ud83d"}',
    "a key of half a surrogate pair": b'{"\\udc80": 1}',
    "NUL": b"\x00" * 64,
}
"""What a reader of exact JSON objects refuses, by name."""


def _named_pipe(path: Path) -> None:
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    """A device without end. For root one of its own: root's mistakes must not reach the machine's."""
    if os.geteuid() == 0:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    else:
        path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path)


PLACES: dict[str, Callable[[Path], None]] = {
    "a named pipe": _named_pipe,
    "a directory": _directory,
    "a device": _device,
    "a link to itself": _loop,
}
"""What is there, but no file."""

KINDS = [*CONTENTS, *PLACES]


def put(kind: str, path: Path) -> Path:
    """Put one of ``KINDS`` at ``path``, in place of what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    else:
        PLACES[kind](path)
    return path
