"""Weights in files of their own: where they are, and whether they are there in full.

In the cache of huggingface_hub a model and its data are links to files named by their hashes, in a directory
``blobs`` beside the one with the links. onnx_ir and ONNX Runtime refuse data that leaves the directory of the
model through a link, so tensors are pointed to the file that the link leads to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from chai_export.errors import ChaiError


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """The initializers whose bytes lie in other files."""
    return [tensor for _, tensor in _external(model)]


def _external(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value, value.const_value


def relocated(tensor: ir.ExternalTensor, file: Path) -> ir.ExternalTensor:
    """The same tensor at the same offset of another file."""
    return ir.ExternalTensor(
        file.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(list(tensor.shape)),
        name=tensor.name,
        base_dir=file.parent,
    )


def locate_external_data(file: Path, model: ir.Model) -> None:
    """Point the initializers of ``model``, read from ``file``, to their data.

    Raises:
        ChaiError: a data file is missing, too short, outside the directory, or has several hard links.
    """
    ir.external_data.set_base_dir(model.graph, file.parent)
    sizes: dict[Path, int] = {}
    for value, tensor in _external(model):
        data = _find(file, str(tensor.location))
        if data not in sizes:
            facts = data.stat()
            if facts.st_nlink > 1:
                raise ChaiError(
                    f"{data} has {facts.st_nlink} hard links, and onnx reads no data that has two names; "
                    "make a copy of it (cp) and remove the link"
                )
            sizes[data] = facts.st_size
        length = tensor.length if tensor.length is not None else tensor.nbytes
        if (tensor.offset or 0) + length > sizes[data] or length < tensor.nbytes:
            raise ChaiError(
                f"{data} is too short for tensor {tensor.name} ({sizes[data]} bytes); "
                "download or export the model again"
            )
        value.const_value = relocated(tensor, data)


def _find(file: Path, location: str) -> Path:
    """The real path of a data file: beside ``file``, or beside what ``file`` is a link to.

    Raises:
        ChaiError: it is in neither place, or it is a way out of them.
    """
    beside = [file.parent.absolute(), file.resolve().parent]
    for directory in beside:
        data = directory / location
        real = data.resolve()
        # A name may not lead out of the directory; a link may, to where the model itself really is.
        if ".." in Path(location).parts or not any(real.is_relative_to(place.resolve()) for place in beside):
            raise ChaiError(f"{file} refers to weights outside its directory ({location}); move them in")
        if real.is_file():
            return real
    raise ChaiError(
        f"{file} needs its weights in {location}, which is missing; put that file into {file.parent}"
    )
