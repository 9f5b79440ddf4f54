"""A bundle on disk: the rewritten model, its tokenizer and its manifest, checked when loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chai_export.arguments import path_of
from chai_export.bundle.file_names import require_inside
from chai_export.bundle.hashing import has_sha256, sha256_file
from chai_export.bundle.manifest import FILE_NAME, FileRecord, Manifest, read_manifest, write_manifest
from chai_export.bundle.tokenizer import load_tokenizer
from chai_export.errors import ChaiError

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
CLUSTERS_FILE, PLAN_FILE = "clusters.json", "plan.json"
ENGINES_DIRECTORY = "engines"


@dataclass(frozen=True)
class Bundle:
    """A validated bundle. Get one from :meth:`load`."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read a bundle and check its manifest, op version and every file's SHA-256.

        Unchanged files (same size and modification time) are not read again. Engines are not looked at
        here; see :func:`chai_export.bundle.engine_record.require_engine`. A bundle that is replaced meanwhile
        is read anew.

        Raises:
            UsageError: ``path`` is none.
            ChaiError: not a bundle, another format or op version, or a file is missing or was changed.
        """
        directory = path_of(path, "bundle")
        manifest = read_manifest(directory)
        while True:
            try:
                _check(directory, manifest)
                return cls(directory, manifest)
            except ChaiError:
                before, manifest = manifest, read_manifest(directory)
                if manifest == before:
                    raise

    def was_replaced(self) -> bool:
        """Whether another bundle has taken the place of this one since it was loaded.

        Raises:
            ChaiError: there is no bundle any more.
        """
        return read_manifest(self.path).files != self.manifest.files

    @property
    def model_path(self) -> Path:
        """The ONNX graph; docs/how-it-works.md lists its inputs and outputs."""
        return self.path / MODEL_FILE

    @property
    def clusters_path(self) -> Path:
        """The plan, or the numbers of kept heads, that the bundle was made with."""
        return self.path / (PLAN_FILE if PLAN_FILE in self.manifest.files else CLUSTERS_FILE)

    def tokenizer(self) -> Any | None:
        """The transformers tokenizer of the bundle, or None if it was made without one.

        Raises:
            ChaiError: its files cannot be loaded.
        """

        return load_tokenizer(self.path)


def _check(directory: Path, manifest: Manifest) -> None:
    """Raise unless the files are those of the manifest."""
    again = "run `chai-export export` (or `rewrite`) again"
    if MODEL_FILE not in manifest.files:
        raise ChaiError(f"{directory / FILE_NAME} lists no {MODEL_FILE}; {again}")
    check_files(directory, manifest.files, again=again)


def finalise(directory: Path, manifest: Manifest) -> Manifest:
    """Hash every file in ``directory`` and write ``manifest.json``: the last step before the rename.

    ``manifest.files`` is replaced; the manifest as written is returned.

    Raises:
        OSError: the directory cannot be written or the disk is full.
    """
    complete = manifest.model_copy(update={"files": record_files(directory, directory)})
    write_manifest(directory, complete)
    return complete


def record_files(directory: Path, root: Path) -> dict[str, FileRecord]:
    """Hash and size of each file below ``directory``, by path relative to ``root``; no manifest.json."""
    return {
        path.relative_to(root).as_posix(): FileRecord(sha256=sha256_file(path), size=path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != root / FILE_NAME
    }


def check_files(root: Path, files: dict[str, FileRecord], *, again: str) -> None:
    """Compare files on disk with their records.

    Raises:
        ChaiError: one is missing, unreadable, differs or lies outside ``root``; names the file and says what
            to run ``again``.
    """
    for name, record in files.items():
        path = root / name
        try:
            require_inside(root, path)
            same = path.stat().st_size == record.size and has_sha256(path, record.sha256)
        except FileNotFoundError:
            raise ChaiError(f"{path} is missing; {again}") from None
        except OSError as error:
            raise ChaiError(f"{path} cannot be read ({error.strerror}); mend that or {again}") from error
        if not same:
            raise ChaiError(f"{path} was changed after the bundle was written (its SHA-256 differs); {again}")
