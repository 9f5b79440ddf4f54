"""Engines inside a bundle: adding one, and checking that it fits this machine before it is used."""

from __future__ import annotations

from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.bundle import MODEL_FILE, Bundle, check_files
from chai_export.bundle.choices import Backend
from chai_export.bundle.manifest import FILE_NAME, EngineRecord, manifest_text, read_manifest
from chai_export.errors import ChaiError


def add_engine(bundle: Bundle, record: EngineRecord) -> Bundle:
    """Enter ``record`` in the bundle's manifest, replacing that backend's earlier one.

    Engines that other processes entered meanwhile are kept.

    Raises:
        ChaiError: the bundle cannot be written, or its model was replaced while the engine was built.
    """
    with atomic_file(bundle.path / FILE_NAME) as file:
        now = read_manifest(bundle.path)
        if now.files != bundle.manifest.files:
            raise ChaiError(
                f"{bundle.path} was replaced while its {record.backend} engine was built; "
                f"run `chai-export build {bundle.path} --backend {record.backend}` again"
            )
        manifest = now.model_copy(update={"engines": {**now.engines, record.backend: record}})
        file.write_text(manifest_text(manifest), encoding="utf-8")
    return Bundle(bundle.path, manifest)


def require_engine(
    bundle: Bundle,
    backend: Backend,
    *,
    runtime: str,
    runtime_version: str,
    gpu_architecture: str | None = None,
    plugin_version: str | None = None,
) -> EngineRecord:
    """The engine of ``backend``, if it can be used here. ``runtime`` is its name in messages ("TensorRT").

    Raises:
        ChaiError: there is none, it was built from another model, with another version of the runtime or
            the plugin, for another GPU, or its files were changed. Says what to run again.
    """
    command = f"run `chai-export build {bundle.path} --backend {backend}`"
    again = f"{command} again"
    record = bundle.manifest.engines.get(backend)
    if record is None:
        raise ChaiError(f"{bundle.path} has no {backend} engine; {command} first")
    comparisons = (
        (f"{runtime} version", record.runtime_version, runtime_version),
        ("GPU architecture", record.gpu_architecture, gpu_architecture),
        ("plugin version", record.plugin_version, plugin_version),
        ("op version", str(record.op_version), str(bundle.manifest.op_version)),
    )
    for what, built, here in comparisons:
        if built != here:
            raise ChaiError(f"the {backend} engine was built for {what} {built} and this is {here}; {again}")
    if record.model_sha256 != bundle.manifest.files[MODEL_FILE].sha256:
        raise ChaiError(f"the {backend} engine was built from another {MODEL_FILE}; {again}")
    check_files(bundle.path, record.files, again=again)
    return record
