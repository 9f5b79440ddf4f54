"""Which files of a directory belong to a bundle, so that a new bundle may replace them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chai_export.bundle.manifest import FILE_NAME, FORMAT
from chai_export.bundle.targets import DirectoryKind, json_object, with_parents

_FAMILY = FORMAT.split("/")[0] + "/"
_ENGINE = (
    "engine.plan",
    "integer_weights.data",
    "kernels/*/index.json",
    "kernels/*/*.cubin",
    "kernels/*/*/index.json",  # by architecture first
    "kernels/*/*/*.cubin",
    "kernels/index.json",  # of engines of version 1 of the op
    "kernels/*.cubin",
)
# What a build may have left: an engine that never came into the manifest, graphs for TensorRT's parser.
_UNRECORDED = (
    "tensorrt.onnx",
    ".tensorrt.onnx",
    ".layers-*.onnx",
    *(f"engines/*/{name}" for name in _ENGINE),
)


def bundle_parts(directory: Path) -> set[str] | None:
    """Relative paths of everything in ``directory`` that we wrote; None unless it is a bundle of any version.

    Files count by name: a damaged bundle is replaced too.
    """
    manifest = json_object(directory / FILE_NAME)
    if manifest is None or not str(manifest.get("format")).startswith(_FAMILY):
        return None
    return with_parents([FILE_NAME, *_recorded(manifest), *_matching(directory, _UNRECORDED)])


def engine_parts(directory: Path) -> set[str] | None:
    """Relative paths of everything in ``directory`` that a build wrote; None if it holds nothing of that."""
    return with_parents(_matching(directory, _ENGINE)) or None


BUNDLE = DirectoryKind("a bundle of chai_export", bundle_parts)
ENGINE = DirectoryKind("an engine of chai_export", engine_parts)


def _recorded(manifest: dict[str, Any]) -> Iterator[str]:
    engines = manifest.get("engines")
    records = [manifest, *(engines.values() if isinstance(engines, dict) else ())]
    for record in records:
        files = record.get("files") if isinstance(record, dict) else None
        if isinstance(files, dict):
            yield from files


def _matching(directory: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    for pattern in patterns:
        for path in directory.glob(pattern):
            yield path.relative_to(directory).as_posix()
