"""What an output may replace: nothing but what we wrote ourselves, and nothing that is still needed.

A writer says which kind of file or directory it makes and what it reads. An existing target that is of
another kind, holds anything else, is or contains a source, or contains the working directory is refused, with
a line that names what stands in the way.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from chai_export.bundle.lock import holder
from chai_export.bundle.work_directory import SUFFIX
from chai_export.errors import ChaiError
from chai_export.files import MOST_JSON_BYTES, read_json

Sources = Iterable[object]
"""What is read for an output. Only paths (or texts) that lead to something count; models in memory do not."""

_ELSEWHERE = "choose another output path"
_MOST_NAMED = 3


@dataclass(frozen=True)
class FileKind:
    """A kind of file: ``noun`` names it with its article, ``is_ours`` recognises one that we wrote."""

    noun: str
    is_ours: Callable[[Path], bool]


@dataclass(frozen=True)
class DirectoryKind:
    """A kind of directory: ``noun`` names it with its article.

    ``parts`` gives the relative paths (``a/b``) of everything that belongs to one that we wrote, its
    directories included, and None for any other directory.
    """

    noun: str
    parts: Callable[[Path], set[str] | None]


def require_file_target(
    target: Path, kind: FileKind | None, sources: Sources, *, settled: bool = True
) -> None:
    """Raise unless ``target`` is free or a file that may be replaced.

    Args:
        target: absolute path without symbolic links.
        kind: of the new file, which an earlier one must be of too; None: whichever it is.
        sources: what is read for the new file.
        settled: no other process can be writing the target; otherwise its content is not judged.

    Raises:
        ChaiError: it is something else, or one of the ``sources``.
    """
    status = _status(target)
    if status is None:
        return
    if stat.S_ISDIR(status.st_mode):
        raise ChaiError(f"{target} is a directory; choose an output file")
    if not stat.S_ISREG(status.st_mode):
        raise ChaiError(f"{target} is no regular file and would be replaced by one; {_ELSEWHERE}")
    _require_no_source(target, sources)
    if settled and kind is not None and status.st_size and not kind.is_ours(target):
        raise ChaiError(
            f"{target} exists and is not {kind.noun}, so it will not be replaced; remove it or {_ELSEWHERE}"
        )


def require_directory_target(
    target: Path, kind: DirectoryKind, sources: Sources, *, settled: bool = True
) -> None:
    """Raise unless ``target`` is free, empty, or a directory that may be replaced as a whole.

    Args:
        target: absolute path without symbolic links.
        kind: of the new directory, which an earlier one must be of too.
        sources: what is read for the new directory.
        settled: no other process can be writing the target; otherwise its content is not judged.

    Raises:
        ChaiError: it is something else, a mount point, contains the working directory or one of the
            ``sources``, holds what does not belong to its kind, or has a name that is not UTF-8.
    """
    try:
        os.fsencode(target).decode("utf-8")
    except UnicodeDecodeError:
        raise ChaiError(
            f"{target} is not valid UTF-8, and ONNX Runtime opens no file by such a name; {_ELSEWHERE}"
        ) from None
    if not target.name or os.path.ismount(target):
        raise ChaiError(f"{target} is a mount point and cannot be replaced; name a directory inside it")
    status = _status(target)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise ChaiError(f"{target} is a file; choose an output directory")
    _require_no_working_directory(target)
    _require_no_source(target, sources)
    if not settled:
        return
    parts = kind.parts(target)
    others = list(islice(_others(target, parts or set()), _MOST_NAMED + 1))
    if others and parts is None:
        raise ChaiError(
            f"{target} is not {kind.noun}: it holds {_listed(others)}, so it will not be replaced; "
            "choose another output directory or empty this one"
        )
    if others:
        raise ChaiError(
            f"{target} holds {_listed(others)}, which chai_export did not write and which would be lost; "
            "move that elsewhere or choose another output directory"
        )


def json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such thing."""
    try:
        return read_json(path, fix="", exact=False)
    except ChaiError:
        return None


def json_with_format(family: str) -> Callable[[Path], bool]:
    """Recognises JSON objects whose ``format`` is a version of ``family``, such as "chai-clusters"."""

    def is_ours(path: Path) -> bool:
        content = json_object(path)
        return content is not None and str(content.get("format")).startswith(f"{family}/")

    return is_ours


def contains(mark: bytes) -> Callable[[Path], bool]:
    """Recognises files that hold ``mark``."""

    def is_ours(path: Path) -> bool:
        return path.stat().st_size <= MOST_JSON_BYTES and mark in path.read_bytes()

    return is_ours


def with_parents(names: Iterable[str]) -> set[str]:
    """Relative paths and all directories on the way to them."""
    whole = {name.rstrip("/") for name in names}
    return whole | {parent.as_posix() for name in whole for parent in Path(name).parents if parent.name}


def _status(target: Path) -> os.stat_result | None:
    try:
        status = os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(status.st_mode):  # links were followed before; this one ends nowhere
        raise ChaiError(f"{target} is a symbolic link in a circle; {_ELSEWHERE}")
    return status


def _require_no_working_directory(target: Path) -> None:
    try:
        here = Path(os.getcwd())
    except FileNotFoundError:  # it was removed
        return
    if _is_within(here, target):
        what = "is" if _same(here, target) else "contains"
        raise ChaiError(
            f"{target} {what} the working directory, which cannot be replaced; "
            "choose another output directory or run the command elsewhere"
        )


def _require_no_source(target: Path, sources: Sources) -> None:
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        path = Path(os.path.expanduser(source))
        if any(_is_within(place, target) for place in _places(path)):
            what = "is" if _same(path, target) else "contains"
            raise ChaiError(f"{target} {what} {path}, which is read for this output; {_ELSEWHERE}")


def _places(source: Path) -> Iterator[Path]:
    """Where the content of a source lies: its own place, where it leads, and where links inside it lead."""
    if not os.path.exists(source):  # a text, or the name of a model on the hub
        return
    yield Path(os.path.realpath(source.parent), source.name)
    yield Path(os.path.realpath(source))
    if source.is_dir():
        for entry in os.scandir(source):
            if entry.is_symlink():
                yield Path(os.path.realpath(entry.path))


def _is_within(path: Path, target: Path) -> bool:
    """Whether ``path`` is ``target`` or below it, by whatever names: compared are the files themselves."""
    try:
        wanted = os.stat(target)
    except FileNotFoundError:  # it is being replaced right now
        return False
    for place in (path, *path.parents):
        try:
            if os.path.samestat(os.lstat(place), wanted):
                return True
        except PermissionError:  # in a folder that this user may not look into: names must do
            if place == target:
                return True
        except (FileNotFoundError, NotADirectoryError):
            continue
    return False


def _same(path: Path, target: Path) -> bool:
    return path.exists() and target.exists() and os.path.samefile(path, target)


def _others(directory: Path, parts: set[str]) -> Iterator[str]:
    """Relative paths of what lies in a directory beside ``parts``."""
    for folder, directories, files in os.walk(directory, onerror=_raise):
        directories.sort()
        for name in sorted(files):
            relative = Path(folder, name).relative_to(directory).as_posix()
            if relative not in parts:
                yield relative
        for name in list(directories):
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            if name.startswith(".") and name.endswith(SUFFIX):
                directories.remove(name)
                writer = holder(path)
                if writer is not None:
                    yield f"{relative}, in which {writer} is writing"
            elif relative not in parts or os.path.ismount(path):
                directories.remove(name)
                yield relative + "/"


def _raise(error: OSError) -> None:
    raise error


def _listed(names: list[str]) -> str:
    more = " and more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
