"""Which stages are up to date: a key per stage of its settings, inputs and the tool's version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import chai_export
from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.hashing import sha256_file
from chai_export.errors import ChaiError
from chai_export.files import read_json

FILE_NAME = "stages.json"


class StageCache:
    """The record of finished stages in an output directory.

    A stage is fresh when its key is the recorded one. The key holds the hashes
    of the input files, so a changed model, text or earlier stage makes every stage after it stale.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._keys: dict[str, str] = {}
        with suppress(ChaiError):  # no record, or a damaged one: every stage runs
            self._keys = {name: str(key) for name, key in read_json(self._path, fix="").items()}

    def is_fresh(self, stage: str, key: str) -> bool:
        """Whether ``stage`` last ended with this key."""
        return self._keys.get(stage) == key

    def record(self, stage: str, key: str) -> None:
        """Remember that ``stage`` ended with this key.

        Raises:
            ChaiError: the directory cannot be written.
        """
        self._keys[stage] = key
        with atomic_file(self._path) as file:
            file.write_text(json.dumps(self._keys, indent=2) + "\n", encoding="utf-8")


def stage_key(settings: Mapping[str, Any], inputs: Iterable[Path]) -> str:
    """Hash of settings, the content of input files and folders, and the tool's version."""
    digest = hashlib.sha256(chai_export.__version__.encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for entry in inputs:
        files = sorted(p for p in entry.rglob("*") if p.is_file()) if entry.is_dir() else [entry]
        for file in files:
            if file.is_file():
                digest.update(f"{file.name}:{sha256_file(file)}".encode())
    return digest.hexdigest()
