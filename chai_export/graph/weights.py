<<<<<<< HEAD
"""Write a rewritten graph with its weights beside it, without ever having them all in memory."""

from __future__ import annotations

import errno
=======
"""Write a rewritten graph with its weights beside it, without ever holding them in memory.

Weights that did not change are moved (if the source is ours), cloned (file systems that share blocks) or
copied with their holes; hard links would be cheaper, but ``onnx`` refuses to read a data file that has two
names, the user's source included. A source whose weights lie in several files is written tensor by tensor.
"""

from __future__ import annotations

>>>>>>> theirs
import fcntl
import os
from pathlib import Path

import onnx_ir as ir

from chai_export.bundle.bundle import MODEL_FILE, WEIGHTS_FILE
from chai_export.graph.load import INLINE_BYTES, external_tensors

_USED_SHARE = 0.9
"""A data file of which less is still used is written anew, without the rest."""
_CLONE = 0x40049409
"""Linux's FICLONE: both files share their blocks until one of them is changed."""
_CHUNK = 2**26

_FICLONE = 0x40049409
_BLOCK = 64 * 2**20


def write_model(model: ir.Model, source: ir.Model, directory: Path, *, take: bool) -> str:
    """Write model.onnx and, if there are weights, model.onnx.data into ``directory``.

<<<<<<< HEAD
    When all weights lie in one file and nearly all of that file is used, the file is taken as it is:

    * moved, if it lies inside ``directory``: it is our own intermediate file;
    * cloned, where the file system can share blocks between files: no bytes are copied;
    * copied otherwise, holes left out.

    Hard links would be as cheap as clones, but onnx refuses to load weights from a file with several links,
    so the user's own model would become unreadable too. All other weights are written tensor by tensor.

    Returns:
        "moved", "cloned", "copied" or "written". After "moved", call :func:`follow` on models that read the
        old file.
=======
    Args:
        model: the rewritten graph.
        source: the graph it was made from; when the data file is taken over, its tensors are pointed to
            the new place, so that it can still be evaluated.
        directory: an existing directory.
        take: the source's data file may be moved away.

    Returns:
        "moved", "cloned", "copied" or "written".
>>>>>>> theirs
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
<<<<<<< HEAD
    source, target = Path(next(iter(files))), directory / WEIGHTS_FILE
    if source.is_relative_to(directory.resolve()):
        for tensor in external:
            tensor.release()
        os.replace(source, target)
        how = "moved"
    else:
        how = duplicate(source, target)
    follow(model, directory)
=======
    old = Path(next(iter(files)))
    how = _transfer(old, directory / WEIGHTS_FILE, take)
    for graph in (model.graph, source.graph):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and os.path.realpath(tensor.path) == str(old):
                value.const_value = _relocated(tensor, directory)
>>>>>>> theirs
    ir.save(model, directory / MODEL_FILE)
    return how


def follow(model: ir.Model, directory: Path) -> None:
    """Let a model whose weights all lie in one file read them from the bundle in ``directory``."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(list(tensor.shape)),
                name=tensor.name,
                base_dir=directory,
            )


def duplicate(source: Path, target: Path) -> str:
    """Make ``target`` an independent file with the bytes of ``source``: "cloned" or "copied"."""
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _CLONE, old.fileno())
            return "cloned"
        except OSError:
            pass  # another file system, or one that cannot share blocks
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        for start, end in _extents(old.fileno(), size):
            old.seek(start)
            new.seek(start)
            while (left := end - old.tell()) > 0:
                new.write(old.read(min(left, _CHUNK)))
    shutil.copymode(source, target)
    return "copied"


def _extents(descriptor: int, size: int) -> list[tuple[int, int]]:
    """The stretches of a file that hold data; all of it where the system cannot tell."""
    extents: list[tuple[int, int]] = []
    position = 0
    try:
        while position < size:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
            extents.append((start, position))
    except OSError as error:
        return extents if error.errno == errno.ENXIO else [(0, size)]  # ENXIO: only a hole is left
    return extents


def _mostly_used(tensors: list[ir.ExternalTensor], file: Path) -> bool:
    parts = {(tensor.offset or 0, tensor.nbytes) for tensor in tensors}
    return sum(length for _, length in parts) >= _USED_SHARE * file.stat().st_size
<<<<<<< HEAD
=======


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


def _relocated(tensor: ir.ExternalTensor, directory: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        WEIGHTS_FILE,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(list(tensor.shape)),
        name=tensor.name,
        base_dir=directory,
    )
>>>>>>> theirs
