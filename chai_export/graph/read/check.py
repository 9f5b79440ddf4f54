"""What a file must hold before anything relies on it: values that are made, tensors as large as they say.

Checked on the bytes as they were read, before they become a graph: onnx_ir believes what a tensor claims, and
a claim of 2^40 elements is written out as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto

from chai_export.errors import ChaiError

_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.STRING: "string_data",
}
"""Where a tensor without raw bytes keeps its elements; all other types have them in int32_data."""


def check_model(file: Path, model: onnx.ModelProto) -> None:
    """Check tensors and connections of a model, subgraphs and functions included.

    Raises:
        ChaiError: the graph is empty; a tensor does not hold what it claims; a node lacks an input, or reads
            a value that nothing makes; a value is made twice, or an output by nothing.
    """
    if not model.graph.output or not model.graph.node:
        raise ChaiError(f"{file} is not a readable ONNX model (its graph is empty); export it again")
    for tensor in _tensors(model):
        _check_tensor(file, tensor)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    _check_values(file, model.graph, frozenset(), opset)
    made = _made(model.graph)
    for value in model.graph.output:
        if value.name not in made:
            raise ChaiError(
                f"{file} is broken: no node produces its output {value.name} (onnxruntime-genai 0.18 writes "
                "such files for fp32 on cuda and dml); build it again with another precision or for the CPU"
            )


def _check_tensor(file: Path, tensor: TensorProto) -> None:
    """Whether a tensor in the file itself has as many elements as its dims say.

    Raises:
        ChaiError: it has not.
    """
    size = prod(tensor.dims)
    if any(dim < 0 for dim in tensor.dims):
        raise ChaiError(
            f"{file} is broken: tensor {tensor.name!r} has dims {list(tensor.dims)}; export it again"
        )
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    bits = size * ir.DataType(tensor.data_type).bitwidth if tensor.data_type != TensorProto.STRING else 0
    if tensor.HasField("raw_data"):
        whole, held = len(tensor.raw_data) == (bits + 7) // 8, f"{len(tensor.raw_data)} bytes"
    else:
        count = len(getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data")))
        # Types of fewer than 8 bits are packed, complex numbers take two entries.
        packed = 8 // ir.DataType(tensor.data_type).bitwidth if 0 < bits < 8 * size else 1
        pairs = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
        whole, held = count == -(-size * pairs // packed), f"{count} elements"
    if not whole:
        raise ChaiError(
            f"{file} is broken: tensor {tensor.name!r} claims {size} elements and holds {held}; "
            "download or export it again"
        )


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor that is stored in the model itself."""
    for graph in _graphs(model.graph):
        yield from graph.initializer
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for inner in _bodies(node):
            yield from _graphs(inner)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def _made(graph: onnx.GraphProto) -> set[str]:
    """Names that a graph defines; nodes may stand in any order, normalisation sorts them."""
    names = {value.name for value in graph.input}
    names |= {tensor.name for tensor in graph.initializer}
    names |= {tensor.values.name for tensor in graph.sparse_initializer}
    return names | {name for node in graph.node for name in node.output if name}


def _check_values(file: Path, graph: onnx.GraphProto, outer: frozenset[str], opset: int) -> None:
    known = outer | _made(graph)
    made: set[str] = set()
    for node in graph.node:
        what = f"{file} is broken: node {node.name!r} ({node.op_type})"
        required = _required(node.op_type, node.domain, opset)
        empty = next((i for i, name in enumerate(node.input) if not name and i in required), None)
        if empty is not None:
            raise ChaiError(f"{what} has an empty name for input {empty}, which it needs; export it again")
        for name in node.input:
            if name and name not in known:
                raise ChaiError(f"{what} reads {name!r}, which nothing produces; export it again")
        for name in node.output:
            if name in made:
                raise ChaiError(f"{what} produces {name!r}, and so does another node; export it again")
            made |= {name} - {""}
        for body in _bodies(node):
            _check_values(file, body, known, opset)


@cache
def _required(op_type: str, domain: str, opset: int) -> frozenset[int]:
    """The inputs that an operator cannot do without; the first where its schema is not known."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return frozenset({0})
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    omitted = {index for index, each in enumerate(schema.inputs) if each.option == optional}
    return frozenset(range(schema.min_input)) - omitted
