"""The hidden directory beside an output in which it is written: its lock, the new content, the old one.

``.NAME.chai-partial`` exists while NAME is written. It is named after its target alone, so all writers of a
target meet there, and who holds its lock owns it. What a dead owner left is put in order by the next writer,
or by a reader.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

from chai_export.bundle.exchange import put_in_place
from chai_export.bundle.lock import DirectoryLock, holder
from chai_export.errors import ChaiError
from chai_export.progress import note

SUFFIX = ".chai-partial"
PATIENCE = 600.0
"""Seconds that a writer waits for another one of the same target."""

_SILENCE = 1.0
_LONGEST_PAUSE = 0.1
_MISSES = 3
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}

_open: set[WorkDirectory] = set()


class WorkDirectory:
    """The work directory of ``target``. Get one that is locked from :func:`acquire`.

    Attributes:
        target: absolute path without symbolic links.
        new: empty directory for the new content.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = work_path(target)
        self.new, self.old = self.path / "new", self.path / "old"
        self.owner = (os.getpid(), threading.get_ident())
        self._made = [parent for parent in target.parents if not parent.exists()]
        self._lock = DirectoryLock(self.path)

    def try_lock(self) -> bool:
        """Own the directory if nobody else does: afterwards ``new`` is there, and nothing else."""
        if not self._lock.take(make=True):
            return False
        self._lock.sign()
        self._put_in_order()
        self.new.mkdir()
        return True

    def install(self) -> None:
        """Make ``new`` the target; see :func:`~chai_export.bundle.exchange.put_in_place`."""
        put_in_place(self.new, self.target, self.old)

    def release(self) -> None:
        """Put the directory in order and remove it, unless another process owns it by now.

        Parents that were made for nothing go as well. May be called at any point, and again.
        """
        if self.owner[0] != os.getpid():  # a fork inherits the object, not the work
            return
        locked = False
        with suppress(OSError):
            locked = self._lock.take(make=False)
        if locked:
            self._put_in_order()
            self._lock.remove()
        else:
            with suppress(OSError):  # it was made, and the lock was not
                self.path.rmdir()
        if not os.path.lexists(self.target):
            for parent in self._made:
                with suppress(OSError):
                    parent.rmdir()
        _open.discard(self)

    def discard(self) -> None:
        """Remove a directory in which nothing was written and no lock can be had."""
        self._lock.remove()
        self.release()

    def _put_in_order(self) -> None:
        """Bring an earlier target back if its replacement never came, and remove everything else."""
        if self.old.exists() and not os.path.lexists(self.target):
            os.rename(self.old, self.target)
        for rest in (self.old, self.new):
            if rest.exists():
                shutil.rmtree(rest, ignore_errors=True)
            if rest.exists():  # directories that were made read-only
                for folder, _, _ in os.walk(rest):
                    with suppress(OSError):
                        os.chmod(folder, 0o700)
                shutil.rmtree(rest, ignore_errors=True)


def acquire(target: Path, *, patience: float = PATIENCE) -> WorkDirectory:
    """Lock the work directory of ``target``; while another process holds it, say so and wait.

    Raises:
        ChaiError: it is held for longer than ``patience`` seconds (names the process), this thread holds it
            already, or the file system has no locks.
        OSError: it cannot be made.
    """
    work = WorkDirectory(target)
    if any(other.target == target and other.owner == work.owner for other in _open):
        raise ChaiError(f"{target} is named for two outputs of one command; choose another for one")
    _open.add(work)
    try:
        _wait_for(work, patience)
    except OSError as error:
        if error.errno not in _NO_LOCKS or error.filename is not None:
            work.release()
            raise
        work.discard()
        raise ChaiError(
            f"{target.parent} is on a file system without file locks ({error.strerror}), so its output "
            "cannot be guarded; choose an output path on another"
        ) from error
    except BaseException:
        work.release()
        raise
    return work


def _wait_for(work: WorkDirectory, patience: float) -> None:
    began, pause, told = time.monotonic(), 0.001, False
    while not work.try_lock():
        waited = time.monotonic() - began
        if waited >= patience:
            raise ChaiError(
                f"{work.target} is being written by {holder(work.path) or 'another process'}; "
                "wait until it has finished, or choose another output path"
            )
        if waited >= _SILENCE and not told:
            note(f"waiting for {holder(work.path) or 'another process'}, which is writing {work.target}")
            told = True
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, pause * 1.5)


def recover(target: Path) -> bool:
    """Whether ``target``, which was not found, is there after all.

    It is missing for a moment while it is replaced on a file system that cannot exchange names; a process
    that was killed in this moment left it set aside, and it is put back.
    """
    misses = 0
    with suppress(OSError):  # a name that cannot exist, or a directory that may only be read
        work = WorkDirectory(Path(os.path.realpath(target)))
        while misses < _MISSES:
            if work.target.exists():
                return True
            misses = 0 if work.old.exists() else misses + 1
            work.release()
            time.sleep(0.01 if work.path.exists() else 0)
    return False


def work_path(target: Path) -> Path:
    """The work directory of ``target``, an absolute path without symbolic links."""
    return target.parent / fitting_name(target.name, target.parent, before=".", after=SUFFIX)


def fitting_name(name: str, directory: Path, *, before: str = "", after: str = "") -> str:
    """``name`` between ``before`` and ``after``, or its hash where that is longer than a name may be."""
    try:
        most = os.pathconf(directory, "PC_NAME_MAX")
    except (OSError, ValueError):
        most = 255
    whole = f"{before}{name}{after}"
    if len(os.fsencode(whole)) <= most:
        return whole
    return f"{before}{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{after}"


def _release_all() -> None:
    """Clean up after exceptions that came between a step and its cleanup: a second Ctrl-C, for instance."""
    for work in list(_open):
        with suppress(OSError):
            work.release()


atexit.register(_release_all)
