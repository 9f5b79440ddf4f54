"""Reading files that users name: whatever lies there, a value comes out, or one line that names the file.

A path may lead to a pipe that nobody writes, a device without end, a directory, or bytes of any kind. Only
regular files are read, and the pipes of a shell (``<(command)``, ``/dev/stdin``), whose writers are there.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from chai_export.errors import ChaiError, reason

MOST_JSON_BYTES = 64 * 2**20
MOST_JSON_DEPTH = 100
_INT64 = range(-(2**63), 2**63)


class MissingFileError(ChaiError):
    """There is no such file."""


def open_file(path: str | Path) -> BinaryIO:
    """Open for reading what can be read to an end; never waits for a writer.

    Raises:
        OSError: it cannot be opened, or is a directory, a named pipe, a socket or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(0, f"its name cannot be one: {error}", str(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        # The pipe of a shell has a name in /dev/fd only, which leads to no file.
        piped = stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(path))
        if not (stat.S_ISREG(mode) or piped):
            raise OSError(0, f"it is {_kind(mode)} and no regular file", str(path))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, *, fix: str, most: int | None = None) -> bytes:
    """The content of a file of up to ``most`` bytes.

    Raises:
        MissingFileError: there is no such file.
        ChaiError: it cannot be read, or is larger.
    """
    try:
        with open_file(path) as file:
            data = file.read() if most is None else file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"there is no file {path}; {fix}") from None
    except OSError as error:
        raise ChaiError(f"{path} cannot be read ({error.strerror}); {fix}") from error
    if most is not None and len(data) > most:
        raise ChaiError(f"{path} has more than {most >> 20} MiB, too much for such a file; {fix}")
    return data


def read_text(path: str | Path, *, fix: str, most: int | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        fix: what the user can do about a file that cannot be used; ends every message.
        most: bytes that the file may have.

    Raises:
        MissingFileError: there is no such file.
        ChaiError: it cannot be read, is larger, or is not UTF-8.
    """
    data = read_bytes(path, fix=fix, most=most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ChaiError(f"{path} is not UTF-8 text (byte {error.start}); {fix}") from None


def read_json(path: str | Path, *, fix: str, exact: bool = True) -> dict[str, Any]:
    """The JSON object in a file; see :func:`parse_json`.

    Raises:
        MissingFileError: there is no such file.
        ChaiError: it cannot be read, is too large, or holds anything but one JSON object.
    """
    text = read_text(path, fix=fix, most=MOST_JSON_BYTES)
    content = parse_json(text, str(path), fix=fix, exact=exact)
    if not isinstance(content, dict):
        raise ChaiError(f"{path} is not a JSON object; {fix}")
    return content


def parse_json(text: str, where: str, *, fix: str, exact: bool = True) -> Any:
    """The value of a JSON text.

    ``exact`` refuses what other readers of the same text would refuse or read differently, and what Python
    fails on later: NaN and infinities, whole numbers beyond 64 bits, lone surrogates. Files of other
    programs may hold them.

    Raises:
        ChaiError: it is not JSON, is nested more than 100 deep, or is not exact; ``where`` says where.
    """
    try:
        if exact:
            content = json.loads(text, parse_int=_int64, parse_float=_finite, parse_constant=_refuse)
        else:
            content = json.loads(text)
        check_plain(content, exact=exact)
    except RecursionError:
        raise ChaiError(f"{where} is nested too deeply; {fix}") from None
    except ValueError as error:
        raise ChaiError(f"{where} is not valid JSON ({reason(error)}); {fix}") from None
    return content


def check_plain(content: Any, *, exact: bool = True) -> None:
    """Raise ValueError if lists and dicts are nested more than 100 deep or (``exact``) a text is no Unicode.

    Shared parts, as YAML has them, are looked at once a level.
    """
    level = [content]
    for _ in range(MOST_JSON_DEPTH):
        children: dict[int, Any] = {}
        for value in level:
            if isinstance(value, dict):
                children.update((id(child), child) for child in value.values())
                texts = [key for key in value if isinstance(key, str)]
            elif isinstance(value, (list, tuple)):
                children.update((id(child), child) for child in value)
                continue
            else:
                texts = [value] if isinstance(value, str) else []
            if exact and any(not is_unicode(text) for text in texts):
                raise ValueError("a text has half of a surrogate pair")
        level = list(children.values())
        if not level:
            return
    raise ValueError(f"nested more than {MOST_JSON_DEPTH} deep")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: no lone surrogates, which stand for bytes that are not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device"


def _int64(digits: str) -> int:
    # Beyond 4300 digits int() raises by itself.
    if len(digits) > 20 or int(digits) not in _INT64:
        raise ValueError(f"the number {digits[:20]}{'…' if len(digits) > 20 else ''} has more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
