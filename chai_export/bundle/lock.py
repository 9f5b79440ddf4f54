"""A lock that lives in a directory of its own, and goes with it when nobody needs it any more.

It is an ``flock``: the kernel drops it when its owner dies, by ``kill -9`` too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

_FILE = "lock"
_TRIES = 100


class DirectoryLock:
    """The lock of a directory, which is made and removed with it. Not held at first.

    An interruption at any point is mended by calling :meth:`take` again, or :meth:`remove`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / _FILE
        self._descriptor: int | None = None

    def take(self, *, make: bool) -> bool:
        """Take the lock unless another process or object has it; True if it is taken.

        The lock file goes with the directory when its owner is done. Who opened it before locks a file that
        is no longer there, and has to try again.

        Args:
            make: make the directory, its parents and the lock file; otherwise no lock file is no lock.

        Raises:
            OSError: the directory cannot be made, or a link is in its place; the file system has no locks.
        """
        missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._directory))
        for _ in range(_TRIES):
            try:
                if self._descriptor is None:
                    self._open(make)
                assert self._descriptor is not None
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self._file)):
                    return True
            except FileNotFoundError as error:
                if not make and self._descriptor is None:
                    return False
                missing = error
            except FileExistsError as error:
                if os.path.lexists(error.filename):
                    raise
            except BlockingIOError:
                self.close()
                return False
            self.close()
        raise missing

    def _open(self, make: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        if make:
            flags |= os.O_CREAT
            _make_directory(self._directory)
        self._descriptor = os.open(self._file, flags, 0o666)

    def sign(self) -> None:
        """Write into the lock, which must be held, whose it is."""
        assert self._descriptor is not None
        with suppress(OSError):  # a full disk: then others do not learn who it is
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)

    def remove(self) -> None:
        """Remove the lock file, which must be held, and the directory if nothing else is in it."""
        with suppress(OSError):
            self._file.unlink()
        with suppress(OSError):
            self._directory.rmdir()
        self.close()

    def close(self) -> None:
        """Give the lock back, and leave its file."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _make_directory(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        # Not a link: in a directory of all users it may lead anywhere.
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise


def holder(directory: Path) -> str | None:
    """Who holds the lock of a directory, as words; None if nobody does."""
    lock = DirectoryLock(directory)
    try:
        if lock.take(make=False) or not (directory / _FILE).exists():
            return None
        process, host = (directory / _FILE).read_text(encoding="utf-8").split()
        return f"process {int(process)}" + ("" if host == socket.gethostname() else f" on {host}")
    except (OSError, ValueError):
        return "another process"
    finally:
        lock.close()
