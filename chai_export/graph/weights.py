"""Write a rewritten graph with its weights beside it: linked when they did not change, streamed otherwise."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx_ir as ir

from chai_export.bundle.bundle import MODEL_FILE, WEIGHTS_FILE
from chai_export.graph.load import INLINE_BYTES, external_tensors

_USED_SHARE = 0.9
"""A data file of which less is still used is written anew, without the rest."""


def write_model(model: ir.Model, directory: Path) -> str:
    """Write model.onnx and, if there are weights, model.onnx.data into ``directory``.

    Weights are never all in memory: they are hard-linked (or copied where links do not reach) when all of
    them lie in one file and nearly all of that file is used, else written tensor by tensor.

    Returns:
        "linked", "copied" or "written".
    """
    external = external_tensors(model)
    files = {os.path.realpath(tensor.path) for tensor in external}
    held = [
        value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    ]
    inline = sum(tensor.nbytes for tensor in held)
    if len(files) != 1 or inline > 2**20 or not _mostly_used(external, Path(next(iter(files)))):
        ir.save(model, directory / MODEL_FILE, external_data=WEIGHTS_FILE, size_threshold_bytes=INLINE_BYTES)
        return "written"
    source, target = Path(next(iter(files))), directory / WEIGHTS_FILE
    try:
        os.link(source, target)
        how = "linked"
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)
        how = "copied"
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _moved(value.const_value, directory)
    ir.save(model, directory / MODEL_FILE)
    return how


def _mostly_used(tensors: list[ir.ExternalTensor], file: Path) -> bool:
    parts = {(tensor.offset or 0, tensor.nbytes) for tensor in tensors}
    return sum(length for _, length in parts) >= _USED_SHARE * file.stat().st_size


def _moved(tensor: ir.ExternalTensor, directory: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        WEIGHTS_FILE,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(list(tensor.shape)),
        name=tensor.name,
        base_dir=directory,
    )
