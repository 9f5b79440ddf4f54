"""A model repository for NVIDIA Triton Inference Server: the engine as one step of a text, caches in and out.

The server's TensorRT backend knows nothing of tokens or caches. Its model is the graph of the bundle: a
client keeps the caches in CUDA shared memory, names one region as past and as present, and feeds tokens.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx

from chai_export.bundle.atomic import atomic_directory
from chai_export.bundle.bundle import Bundle, check_files
from chai_export.bundle.choices import Backend
from chai_export.bundle.manifest import EngineRecord, write_manifest
from chai_export.bundle.targets import DirectoryKind, json_object, with_parents
from chai_export.engines.tensorrt import DIRECTORY, PLAN_FILE
from chai_export.errors import ChaiError, UsageError
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.runtime.native import find_library
from chai_export.runtime.tensorrt_environment import HELD_AS, TENSORRT_LIBRARY
from chai_export.version import CREATED_WITH

MODELS, PLUGINS, CLIENT = "models", "plugins", "client"
START_FILE = "start.sh"
RECORD_FILE, RECORD_FORMAT = "chai-repository.json", "chai-triton-repository/1"
_DATA_TYPES = {
    element.onnx: ELEMENT_TYPES[HELD_AS.get(name, name)].triton_server
    for name, element in ELEMENT_TYPES.items()
}
"""Of the engine's tensors, by the type that the graph has for them."""


def write_model_repository(bundle: Bundle, directory: str | Path, *, name: str = "chai") -> Path:
    """Write a model repository, the plugin library, what a client needs and a start script.

    ``models/NAME`` holds the engine and its config.pbtxt, ``plugins`` the library that the server loads
    first, ``client`` the manifest and the tokenizer, and ``start.sh`` the command. ``chai-repository.json``
    lists them.

    Args:
        bundle: a bundle with a TensorRT engine.
        directory: output; replaced if it was written by this function before.
        name: of the model on the server.

    Raises:
        UsageError: ``name`` cannot be the name of a directory.
        ChaiError: the bundle has no TensorRT engine, its files were changed, the plugin library is missing,
            or the directory cannot be written.
    """
    build = f"`chai-export build {bundle.path} --backend {Backend.TENSORRT}`"
    record = bundle.manifest.engines.get(Backend.TENSORRT)
    if record is None:
        raise ChaiError(f"{bundle.path} has no {Backend.TENSORRT} engine; run {build} first")
    check_files(bundle.path, record.files, again=f"run {build} again")
    library = find_library(TENSORRT_LIBRARY)
    if record.plugin_version is not None and library is None:
        raise ChaiError(
            f"lib{TENSORRT_LIBRARY}.so is not installed here and the engine needs it; package on the machine "
            "that built the engine"
        )
    _require_name(name)
    target = Path(directory)
    with atomic_directory(target, REPOSITORY, sources=[bundle.path]) as root:
        version = root / MODELS / name / "1"
        version.mkdir(parents=True)
        shutil.copyfile(bundle.path / DIRECTORY / PLAN_FILE, version / "model.plan")
        config = model_config(bundle, name)
        (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
        if record.plugin_version is not None and library is not None:
            (root / PLUGINS).mkdir()
            shutil.copyfile(library, root / PLUGINS / library.name)
        _write_client_files(bundle, root / CLIENT)
        start = root / START_FILE
        start.write_text(start_script(record), encoding="utf-8")
        start.chmod(0o755)
        _write_record(root)
    return target


def repository_parts(directory: Path) -> set[str] | None:
    """Relative paths of everything in a repository that we wrote; None for any other directory."""
    record = json_object(directory / RECORD_FILE)
    if record is None or not str(record.get("format")).startswith("chai-triton-repository/"):
        return None
    files = record.get("files")
    return with_parents([RECORD_FILE, *(map(str, files) if isinstance(files, list) else ())])


REPOSITORY = DirectoryKind("a model repository of chai_export", repository_parts)


def _write_record(root: Path) -> None:
    """What was written, so that the next package replaces that and nothing else."""
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    record = {"format": RECORD_FORMAT, "created_with": CREATED_WITH, "files": files}
    (root / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _require_name(name: str) -> None:
    """Raise unless ``name`` can be a directory of the repository."""
    if not name or name.startswith(".") or set(name) & set('/\\"\0\n'):
        raise UsageError(f"--name {name!r} cannot name a model; use letters, digits, - and _")


def model_config(bundle: Bundle, name: str) -> str:
    """config.pbtxt of the engine: every input and output of the graph with its full shape."""
    graph = onnx.load(str(bundle.model_path), load_external_data=False).graph
    lines = [f'name: "{name}"', 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            dims = ", ".join(str(dim.dim_value or -1) for dim in tensor.shape.dim)
            data_type = _DATA_TYPES[tensor.elem_type]
            lines.append(f'{kind} [{{ name: "{value.name}", data_type: {data_type}, dims: [ {dims} ] }}]')
    # Profile 0 takes prompts, profile 1 single tokens; the backend chooses by shape.
    lines.append('instance_group [{ count: 1, kind: KIND_GPU, profile: [ "0", "1" ] }]')
    return "\n".join(lines) + "\n"


def start_script(record: EngineRecord) -> str:
    """The command that serves the repository; its first lines say what the server must bring."""
    plugins = (
        f',plugins="$here/{PLUGINS}/lib{TENSORRT_LIBRARY}.so"' if record.plugin_version is not None else ""
    )
    config = f"--backend-config=tensorrt{plugins} " if plugins else ""
    return (
        "#!/usr/bin/env bash\n"
        f"# Needs a Triton Inference Server with TensorRT {record.runtime_version} and a GPU of "
        f"{record.gpu_architecture}.\n"
        "set -euo pipefail\n"
        'here="$(cd "$(dirname "$0")" && pwd)"\n'
        f'exec tritonserver --model-repository="$here/{MODELS}" {config}"$@"\n'
    )


def _write_client_files(bundle: Bundle, directory: Path) -> None:
    """Tokenizer, generation defaults and a manifest without files: what a client reads, not what runs."""
    directory.mkdir()
    weights = {name for name in bundle.manifest.files if name.startswith("model.onnx")}
    for name in bundle.manifest.files.keys() - weights:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, directory / name)
    write_manifest(directory, bundle.manifest.model_copy(update={"files": {}, "engines": {}}))
