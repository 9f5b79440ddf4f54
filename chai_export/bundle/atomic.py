"""Output that is either complete or absent, however the process ends.

Everything is written into a locked :mod:`~chai_export.bundle.work_directory` beside the target and takes its
place in one step at the end. What may be replaced is decided (:mod:`~chai_export.bundle.targets`) before the
work and once more before that step; in between the lock keeps other writers waiting.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chai_export.bundle.targets import (
    DirectoryKind,
    FileKind,
    Sources,
    require_directory_target,
    require_file_target,
)
from chai_export.bundle.work_directory import PATIENCE, WorkDirectory, acquire, work_path
from chai_export.errors import ChaiError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_SUCH_PLACE = {errno.ENOENT, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EBUSY}
_NEARLY_NOTHING = 64 * 1024


@contextmanager
def atomic_directory(path: str | Path, kind: DirectoryKind, *, sources: Sources = ()) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends without an error.

    Enter the block before the long work: it refuses a target that may not be replaced, waits for another
    writer of the same target, and keeps later ones waiting. On an error nothing is left, not even parent
    directories made for it.

    Args:
        path: the output; symbolic links are followed.
        kind: what is written. An existing directory is replaced, as a whole, if it is empty or of this kind
            and holds nothing else.
        sources: what the output is made from; none of it may lie in an existing ``path``.

    Raises:
        ChaiError: the target may not be replaced (names what stands in the way), is being written by another
            process for too long, or cannot be written; the disk is full.
    """
    target = _absolute(path)
    kept = list(sources)

    def require(settled: bool) -> None:
        require_directory_target(target, kind, kept, settled=settled)

    with _locked(target, require) as work:
        yield work.new
        require(settled=True)
        work.install()


@contextmanager
def atomic_file(
    path: str | Path,
    kind: FileKind | None = None,
    *,
    sources: Sources = (),
    patience: float = PATIENCE,
) -> Iterator[Path]:
    """Yield a path to write to; the file written there becomes ``path`` when the block succeeds.

    Args:
        path: the output; symbolic links are followed.
        kind: what is written. An existing file is replaced if it is empty or of this kind; None is for files
            inside directories of ours, where any file of the name is replaced.
        sources: what the output is made from; ``path`` may be none of it.
        patience: seconds to wait for another process that writes the same file.

    Raises:
        ChaiError: as :func:`atomic_directory`.
    """
    target = _absolute(path)
    kept = list(sources)

    def require(settled: bool) -> None:
        require_file_target(target, kind, kept, settled=settled)

    with _locked(target, require, patience) as work:
        file = work.new / target.name
        yield file
        require(settled=True)
        os.replace(file, target)


@contextmanager
def reserved(path: str | Path) -> Iterator[None]:
    """Keep other writers of ``path`` waiting, without writing it.

    Raises:
        ChaiError: another process holds it for too long, or its directory cannot be written.
    """
    with _locked(_absolute(path), lambda settled: None):
        yield


def _absolute(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


@contextmanager
def _locked(
    target: Path, require: Callable[[bool], None], patience: float = PATIENCE
) -> Iterator[WorkDirectory]:
    """Check, lock, check again; then the block. Errors about the target are told in terms of the target."""
    work: WorkDirectory | None = None
    try:
        require(False)
        work = acquire(target, patience=patience)
        require(True)
        yield work
    except BaseException as error:
        translated = _translate(error, target)
        if translated is None:
            raise
        raise translated from error
    finally:
        if work is not None:
            work.release()


def _translate(error: BaseException, target: Path) -> ChaiError | None:
    """The error in terms of ``target``; None if it has another cause, such as an input that is missing."""
    if _is_full(error, target.parent):
        reason = " ".join((str(error) or type(error).__name__).split())
        return ChaiError(
            f"no space left to write {target} ({reason}); free some space or choose another output path"
        )
    cause = _cause(error, target) if isinstance(error, OSError) and error.filename is not None else None
    if cause is None:
        return None
    return ChaiError(f"{target} cannot be written ({cause}); choose another output path")


def _cause(error: OSError, target: Path) -> str | None:
    """What keeps ``target`` from being written; None if the error is about another file."""
    place, hidden = Path(os.fsdecode(error.filename)), work_path(target)
    inside = place.is_relative_to(hidden)
    if not inside and not target.is_relative_to(place):
        return None
    if error.errno in _FORBIDDEN:
        return f"{error.strerror} in {target.parent}"
    if error.errno in {errno.EEXIST, errno.ENOTDIR}:
        return f"{place} is in the way" if place == hidden else f"{place} is no directory"
    if error.errno == errno.ENOENT and inside:
        return f"{target.parent} was moved or removed meanwhile"
    return error.strerror if error.errno in _NO_SUCH_PLACE else None


def _is_full(error: BaseException, parent: Path) -> bool:
    """Whether ``error`` comes from a full disk. Some writers hide the cause, so the disk is asked as well."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if not isinstance(error, Exception) or isinstance(error, ChaiError):
        return False
    with suppress(OSError):
        return shutil.disk_usage(parent).free < _NEARLY_NOTHING
    return False
