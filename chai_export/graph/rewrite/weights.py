"""Write a rewritten graph with its weights beside it, without ever holding them in memory.

Weights that did not change are moved (if the source is ours), cloned (file systems that share blocks) or
copied with their holes; hard links would be cheaper, but ``onnx`` refuses to read a data file that has two
names, the user's source included. A source whose weights lie in several files is written tensor by tensor.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import onnx_ir as ir

from chai_export.bundle.bundle import MODEL_FILE, WEIGHTS_FILE
from chai_export.graph.read.external_data import external_tensors, relocated
from chai_export.graph.read.normalise import INLINE_BYTES

_MOST_INLINE = 64 * 2**20
"""Bytes that may stay in model.onnx itself, such as tables of cos and sin."""
_USED_SHARE = 0.9
"""A data file of which less is still used is written anew, without the rest."""

_FICLONE = 0x40049409
_BLOCK = 64 * 2**20


def write_model(model: ir.Model, source: ir.Model, directory: Path, *, take: bool) -> str:
    """Write model.onnx and, if there are weights, model.onnx.data into ``directory``.

    Args:
        model: the rewritten graph.
        source: the graph it was made from; when the data file is taken over, its tensors are pointed to
            the new place, so that it can still be evaluated.
        directory: an existing directory.
        take: the source's data file may be moved away.

    Returns:
        "moved", "cloned", "copied" or "written".
    """
    external = external_tensors(model)
    files = {os.path.realpath(tensor.path) for tensor in external}
    held = [
        value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    ]
    inline = sum(tensor.nbytes for tensor in held)
    if len(files) != 1 or inline > _MOST_INLINE or not _mostly_used(external, Path(next(iter(files)))):
        ir.save(model, directory / MODEL_FILE, external_data=WEIGHTS_FILE, size_threshold_bytes=INLINE_BYTES)
        return "written"
    old = Path(next(iter(files)))
    how = _transfer(old, directory / WEIGHTS_FILE, take)
    for graph in (model.graph, source.graph):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and os.path.realpath(tensor.path) == str(old):
                value.const_value = relocated(tensor, directory / WEIGHTS_FILE)
    ir.save(model, directory / MODEL_FILE)
    return how


def _mostly_used(tensors: list[ir.ExternalTensor], file: Path) -> bool:
    parts = {(tensor.offset or 0, tensor.nbytes) for tensor in tensors}
    return sum(length for _, length in parts) >= _USED_SHARE * file.stat().st_size


def _transfer(source: Path, target: Path, take: bool) -> str:
    if take and source.stat().st_dev == target.parent.stat().st_dev:
        os.replace(source, target)
        return "moved"
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError:  # a file system that cannot share blocks, or another one
            _copy(reader.fileno(), writer.fileno(), source.stat().st_size)
            return "copied"
    return "cloned"


def _copy(reader: int, writer: int, size: int) -> None:
    """Copy the parts of a file that hold data and leave its holes as holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(reader, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            break
        end = os.lseek(reader, start, os.SEEK_HOLE)
        while start < end:
            block = os.pread(reader, min(_BLOCK, end - start), start)
            written = 0
            while written < len(block):
                written += os.pwrite(writer, block[written:], start + written)
            start += len(block)
    os.ftruncate(writer, size)
