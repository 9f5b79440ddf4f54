"""Cut a part out of a graph and run it in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from chai_export.graph.match.roles import Roles, Sizes
from chai_export.graph.prove.float32 import to_float32
from chai_export.op.dtypes import ELEMENT_TYPES

Array = NDArray[Any]

MAX_SLICE_BYTES = 256 * 2**20
"""A mask or an attention has no weights to speak of; a slice with more than this is not one."""


class EvaluationError(Exception):
    """The slice cannot be built, or ONNX Runtime refused to run it with these sizes."""


@dataclass(frozen=True)
class Slice:
    """The nodes between some leaves and outputs, as a model of its own.

    ``leaves`` are cut points chosen by the caller, ``shapes`` the values whose producing Shape node was cut
    off (so that a cache need not be fed only for its size), ``inputs`` the graph inputs that remain.
    ``casts`` are the types that the graph casts to; those of 16 bits are float32 in the session.
    """

    session: Any
    leaves: tuple[ir.Value, ...]
    shapes: tuple[ir.Value, ...]
    inputs: tuple[ir.Value, ...]
    casts: frozenset[ir.DataType]

    def run(self, roles: Roles, sizes: Sizes, feeds: Mapping[ir.Value, Array]) -> list[Array]:
        """Evaluate with the given arrays for leaves and inputs; sizes of cut-off shapes follow ``sizes``.

        Raises:
            EvaluationError: a value has no array, or ONNX Runtime fails.
        """
        arrays = {str(value.name): array for value, array in feeds.items()}
        for value in self.shapes:
            arrays[str(value.name)] = _shape_of(value, roles, sizes)
        wanted = {info.name: info for info in self.session.get_inputs()}
        missing = sorted(set(wanted) - set(arrays))
        if missing:
            raise EvaluationError(f"it depends on {', '.join(missing)}")
        typed = {name: _typed(arrays[name], info.type) for name, info in wanted.items()}
        try:
            return list(self.session.run(None, typed))
        except Exception as error:  # onnxruntime raises types of its own that it does not export
            raise EvaluationError(str(error).strip().splitlines()[0][:200]) from error


_ELEMENT_TYPES = {element.onnxruntime: element for element in ELEMENT_TYPES.values()}


def _typed(array: Array, onnxruntime_type: str) -> Array:
    """``array`` in the type of a session's input; as it is where that is none of ours, such as bool."""
    element = _ELEMENT_TYPES.get(onnxruntime_type)
    return array if element is None else array.astype(element.numpy, copy=False)


def cut(graph: ir.Graph, leaves: Sequence[ir.Value], outputs: Sequence[ir.Value], roles: Roles) -> Slice:
    """Build a runnable model of everything between ``leaves`` and ``outputs``, in float32 throughout.

    Raises:
        EvaluationError: it holds weights, or ONNX Runtime cannot load it.
    """
    stops = set(leaves)
    shapes: list[ir.Value] = []
    inputs: list[ir.Value] = []
    initializers: dict[str, ir.Value] = {}
    nodes: set[ir.Node] = set()
    reached: dict[ir.Value, None] = {}
    stack = list(outputs)
    probe = Sizes(2, 3, 5)
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in stops:
            reached[value] = None
            continue
        if value.is_initializer() or (node is None and value.const_value is not None):
            initializers[str(value.name)] = value
        elif node is None:
            if value not in inputs:
                inputs.append(value)
        elif node.op_type == "Shape" and node.domain == "" and _is_known_shape(node, roles, probe):
            if value not in shapes:
                value.type = ir.TensorType(ir.DataType.INT64)
                shapes.append(value)
        elif node not in nodes:
            nodes.add(node)
            stack.extend(item for item in node.inputs if item is not None)
    size = sum(v.const_value.nbytes for v in initializers.values() if v.const_value is not None)
    if size > MAX_SLICE_BYTES:
        raise EvaluationError("it depends on the model's weights")
    cut_off = [*reached, *shapes, *inputs]
    view = ir.GraphView(
        cut_off,
        list(outputs),
        nodes=[node for node in graph if node in nodes],
        initializers=tuple(initializers.values()),
        opset_imports=graph.opset_imports,
        name="slice",
    )
    model = ir.Model(view.clone(), ir_version=10)
    forget_shapes(model.graph)
    to_float32(model)
    casts = frozenset(ir.DataType(node.attributes["to"].as_int()) for node in nodes if node.op_type == "Cast")
    return Slice(session(model), tuple(leaves), tuple(shapes), tuple(inputs), casts)


def session(model: ir.Model) -> Any:
    """An ONNX Runtime CPU session of a small model, without graph optimisations.

    Raises:
        EvaluationError: ONNX Runtime cannot load it.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        data = ir.serde.serialize_model(model).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own that it does not export
        raise EvaluationError(str(error).strip().splitlines()[0][:300]) from error


def forget_shapes(graph: ir.Graph) -> None:
    """Drop stated shapes of inputs and inner values.

    Callers feed other sizes than the exporter stated, such as one head for all; and some exporters state
    wrong ones (onnxruntime-genai names repeated keys after the new tokens only).
    """
    for value in graph.inputs:
        if value.type is None:  # behind an operator that ONNX cannot infer types through; these carry numbers
            value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
    for node in graph:
        for output in node.outputs:
            output.shape = None


def _is_known_shape(node: ir.Node, roles: Roles, sizes: Sizes) -> bool:
    source = node.inputs[0]
    if source is None:
        return False
    dims = roles.dims(source, sizes)
    return dims is not None and all(dim is not None for dim in _between(node, dims))


def _shape_of(value: ir.Value, roles: Roles, sizes: Sizes) -> Array:
    node = value.producer()
    assert node is not None
    assert node.inputs[0] is not None
    dims = roles.dims(node.inputs[0], sizes)
    assert dims is not None
    return np.array(_between(node, dims), dtype=np.int64)


def _between(node: ir.Node, dims: list[int | None]) -> list[int | None]:
    start, end = node.attributes.get("start"), node.attributes.get("end")
    return dims[start.as_int() if start is not None else 0 : end.as_int() if end is not None else None]
