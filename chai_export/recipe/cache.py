"""Which stages are up to date: a key per stage of its settings, inputs and the tool's version."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.hashing import sha256_file
from chai_export.bundle.targets import json_object, json_with_format
from chai_export.bundle.work_directory import SUFFIX
from chai_export.errors import ChaiError
from chai_export.version import __version__

FILE_NAME = "stages.json"
FORMAT = "chai-make/1"
_FAMILY = FORMAT.split("/", maxsplit=1)[0]


class StageCache:
    """The record of finished stages in an output directory, which it also marks as ours.

    A stage is fresh when its key is the recorded one. The key holds the hashes
    of the input files, so a changed model, text or earlier stage makes every stage after it stale.

    Raises:
        ChaiError: the directory holds something and no record.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._keys: dict[str, str] = {}
        if json_with_format(_FAMILY)(self._path):
            stages = (json_object(self._path) or {}).get("stages")
            if isinstance(stages, dict):
                self._keys = {str(name): str(key) for name, key in stages.items()}
        elif others := _entries(directory):
            raise ChaiError(
                f"{directory} was not made by `chai-export make` and holds {', '.join(others[:3])}"
                f"{' and more' if len(others) > 3 else ''}; change `output` in the recipe or empty it"
            )

    def begin(self) -> None:
        """Mark the directory as ours, before anything else is written there.

        Raises:
            ChaiError: the directory cannot be written.
        """
        if not self._path.exists():
            self._write()

    def end(self) -> None:
        """Take the mark away again if nothing came of it."""
        if not self._keys and _entries(self._path.parent) == [FILE_NAME]:
            self._path.unlink()

    def is_fresh(self, stage: str, key: str) -> bool:
        """Whether ``stage`` last ended with this key."""
        return self._keys.get(stage) == key

    def record(self, stage: str, key: str) -> None:
        """Remember that ``stage`` ended with this key.

        Raises:
            ChaiError: the directory cannot be written.
        """
        self._keys[stage] = key
        self._write()

    def _write(self) -> None:
        content = {"format": FORMAT, "stages": self._keys}
        with atomic_file(self._path) as file:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _entries(directory: Path) -> list[str]:
    """Names in a directory, without what writers use while they write; none if there is no directory.

    Raises:
        ChaiError: it is no directory, or cannot be read.
    """
    try:
        return sorted(name for name in os.listdir(directory) if not name.endswith(SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ChaiError(
            f"{directory} cannot be written ({error.strerror}); change `output` in the recipe"
        ) from error


def stage_key(settings: Mapping[str, Any], inputs: Iterable[Path]) -> str:
    """Hash of settings, the content of input files and folders, and the tool's version."""
    digest = hashlib.sha256(__version__.encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for entry in inputs:
        files = sorted(p for p in entry.rglob("*") if p.is_file()) if entry.is_dir() else [entry]
        for file in files:
            if file.is_file():
                digest.update(f"{file.name}:{sha256_file(file)}".encode())
    return digest.hexdigest()
