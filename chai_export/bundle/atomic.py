"""Output that is either complete or absent, however the process ends.

Everything is written into a locked directory beside the target and renamed into place at the end. The
lock is an ``flock``: the kernel drops it when its owner dies, by ``kill -9`` too, so a partial directory
that can be locked belongs to nobody and is removed by the next run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chai_export.errors import ChaiError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NEARLY_NOTHING = 64 * 1024


@contextmanager
def atomic_directory(path: str | Path, *, replaces: str = "manifest.json") -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that becomes ``path`` when the block ends without an error.

    An existing directory at ``path`` is replaced only if it is empty or holds a file named ``replaces``
    (then it was written by us). On an error nothing is left, not even parent directories made for it.

    Raises:
        ChaiError: the target is a file, a mount point or somebody else's directory; it cannot be
            written; the disk is full.
    """
    target = _target(path)
    if target.is_dir():
        if any(target.iterdir()) and not (target / replaces).is_file():
            raise ChaiError(
                f"{target} exists and holds no {replaces}, so it will not be replaced; "
                "choose another output directory or empty this one"
            )
    elif target.exists():
        raise ChaiError(f"{target} is a file; choose an output directory")
    with _partial(target) as partial:
        yield partial
        _swap(partial, target)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; the file written there becomes ``path`` when the block succeeds.

    Raises:
        ChaiError: the target is a directory, cannot be written, or the disk is full.
    """
    target = _target(path)
    if target.is_dir():
        raise ChaiError(f"{target} is a directory; choose an output file")
    if target.exists() and not target.is_file():
        # Renaming over a device or a pipe would take it away from every other program.
        raise ChaiError(f"{target} is no regular file and will not be replaced; choose an output file")
    with _partial(target) as partial:
        yield partial / target.name
        os.replace(partial / target.name, target)


def _target(path: str | Path) -> Path:
    target = Path(os.path.realpath(path))
    if not target.name or target.is_mount():
        raise ChaiError(f"{target} is a mount point and cannot be replaced; name a directory inside it")
    return target


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A locked empty directory ``.NAME.partial-PID`` beside ``target``; gone when the block ends."""
    made = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    lock = -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a file system without locks: only stale partials go unnoticed
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
    except BaseException as error:
        full = _is_full(error, target.parent)
        _discard(partial, made, owned=lock >= 0)
        translated = _translate(error, target, partial, full)
        if translated is None:
            raise
        raise translated from error
    finally:
        if lock >= 0:
            os.close(lock)
    shutil.rmtree(partial, ignore_errors=True)


def _discard(partial: Path, made: list[Path], *, owned: bool) -> None:
    if owned:
        shutil.rmtree(partial, ignore_errors=True)
    for directory in made:
        with suppress(OSError):
            directory.rmdir()


def _recover(target: Path) -> None:
    """Remove what a killed run left beside ``target``, and put back what it had set aside."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
    for stale in target.parent.glob(f".{_glob_escape(target.name)}.partial-*"):
        with suppress(OSError):
            descriptor = os.open(stale, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale, ignore_errors=True)
            finally:
                os.close(descriptor)


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _swap(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    aside = _aside(target)
    target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_full(error: BaseException, parent: Path) -> bool:
    """Whether ``error`` comes from a full disk. Some writers hide the cause, so the disk is asked as well."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if not isinstance(error, Exception) or isinstance(error, ChaiError):
        return False
    with suppress(OSError):
        return shutil.disk_usage(parent).free < _NEARLY_NOTHING
    return False


def _translate(error: BaseException, target: Path, partial: Path, full: bool) -> ChaiError | None:
    if full:
        reason = " ".join((str(error) or type(error).__name__).split())
        return ChaiError(
            f"no space left to write {target} ({reason}); free some space or choose another output path"
        )
    if not isinstance(error, OSError) or not _concerns(error, target, partial):
        return None
    if error.errno in _FORBIDDEN:
        return ChaiError(f"{target} cannot be written ({error.strerror}); choose another output path")
    if error.errno in {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EBUSY}:
        return ChaiError(f"{target} cannot be created ({error.strerror}); choose another output path")
    return None


def _concerns(error: OSError, target: Path, partial: Path) -> bool:
    """Whether the error is about the output: reading an input that is missing is not ours to explain."""
    if error.filename is None:
        return False
    path = os.fsdecode(error.filename)
    return Path(path).is_relative_to(partial) or target.is_relative_to(path)
