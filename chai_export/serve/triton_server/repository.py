"""A model repository for NVIDIA Triton Inference Server: a bundle, a configuration, a few lines of Python."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from chai_export.bundle.atomic import atomic_directory
from chai_export.bundle.bundle import Bundle, check_files
from chai_export.bundle.choices import Backend
from chai_export.bundle.manifest import write_manifest
from chai_export.bundle.targets import DirectoryKind, json_object, with_parents
from chai_export.errors import ChaiError, UsageError
from chai_export.serve.triton_server.python_model import BUNDLE
from chai_export.serve.triton_server.settings import Settings
from chai_export.serve.triton_server.tensors import INPUTS, OUTPUTS, Value
from chai_export.version import CREATED_WITH

CONFIG_FILE, MODEL_FILE = "config.pbtxt", "model.py"
RECORD_FILE, RECORD_FORMAT = "chai-repository.json", "chai-triton-repository/2"
MODEL = '''\
"""The server's way into chai_export, which its Python back end must find: pip install chai-export."""

import triton_python_backend_utils as server

from chai_export.serve.triton_server.python_model import PythonModel


class TritonPythonModel:
    def initialize(self, args):
        self._model = PythonModel(server, args)

    def execute(self, requests):
        self._model.execute(requests)

    def finalize(self):
        self._model.close()
'''


def write_model_repository(
    bundle: Bundle, directory: str | Path, settings: Settings, *, name: str = "chai"
) -> Path:
    """Write a model repository: ``NAME/config.pbtxt``, ``NAME/1/model.py`` and the bundle beside it.

    ``chai-repository.json`` lists what was written; the server passes over it.

    Args:
        bundle: what is served; of its engines only the one that is used goes along.
        directory: output; replaced if it was written by this function before.
        settings: how it is served.
        name: of the model on the server.

    Raises:
        UsageError: ``name`` cannot name a model.
        ChaiError: the bundle has no engine of the back end, its files were changed, or the directory cannot
            be written.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
        raise UsageError(f"--name {name!r} cannot name a model; use letters, digits, - and _")
    engine = bundle.manifest.engines.get(settings.backend)
    if engine is None and settings.backend is not Backend.ONNXRUNTIME:
        build = f"`chai-export build {bundle.path} --backend {settings.backend}`"
        raise ChaiError(f"{bundle.path} has no {settings.backend} engine; run {build} first")
    files = dict(bundle.manifest.files)
    if engine is not None:
        again = f"run `chai-export build {bundle.path} --backend {settings.backend}` again"
        check_files(bundle.path, engine.files, again=again)
        files |= engine.files
    target = Path(directory)
    with atomic_directory(target, REPOSITORY, sources=[bundle.path]) as root:
        version = root / name / "1"
        copied = version / BUNDLE
        for file in files:
            (copied / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / file, copied / file)
        engines = {} if engine is None else {settings.backend: engine}
        write_manifest(copied, bundle.manifest.model_copy(update={"engines": engines}))
        (version / MODEL_FILE).write_text(MODEL, encoding="utf-8")
        instances = _instances(settings, on_gpu=engine is not None and bool(engine.files))
        config = model_config(name, settings, instances)
        (root / name / CONFIG_FILE).write_text(config, encoding="utf-8")
        _write_record(root)
    return target


def model_config(name: str, settings: Settings, instances: str) -> str:
    """config.pbtxt: inputs, outputs, decoupled responses, instances, and the settings as parameters."""
    lines = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 0"]
    lines += [_tensor("input", value, ", optional: true") for value in INPUTS]
    lines += [_tensor("output", value) for value in OUTPUTS]
    lines += [
        "model_transaction_policy { decoupled: true }",
        "# Each instance has an engine and a cache of its own.",
        f"instance_group [{{ count: 1, {instances} }}]",
        *(
            f'parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}'
            for key, value in settings.options().items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _instances(settings: Settings, *, on_gpu: bool) -> str:
    if not on_gpu:
        return "kind: KIND_CPU"
    # TensorRT's session follows torch to the instance's GPU; ONNX Runtime's is on the first.
    return "kind: KIND_GPU" + ("" if settings.backend is Backend.TENSORRT else ", gpus: [ 0 ]")


def repository_parts(directory: Path) -> set[str] | None:
    """Relative paths of everything in a repository that we wrote; None for any other directory."""
    record = json_object(directory / RECORD_FILE)
    if record is None or not str(record.get("format")).startswith("chai-triton-repository/"):
        return None
    files = record.get("files")
    return with_parents([RECORD_FILE, *(map(str, files) if isinstance(files, list) else ())])


REPOSITORY = DirectoryKind("a model repository of chai_export", repository_parts)


def _tensor(kind: str, value: Value, more: str = "") -> str:
    size = -1 if value.many else 1
    return f'{kind} [{{ name: "{value.name}", data_type: {value.type}, dims: [ {size} ]{more} }}]'


def _write_record(root: Path) -> None:
    """What was written, so that the next package replaces that and nothing else."""
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    record = {"format": RECORD_FORMAT, "created_with": CREATED_WITH, "files": files}
    (root / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
