"""Run a large graph piece by piece, so that only one piece's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from chai_export.graph.prove.evaluate import EvaluationError, forget_shapes
from chai_export.graph.prove.float32 import float32_bytes, to_float32
from chai_export.graph.prove.in_memory import in_memory

Array = NDArray[Any]

SEGMENT_BYTES = 384 * 2**20
"""Of weights as float32, in a piece."""


@dataclass(frozen=True)
class _Segment:
    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    initializers: list[ir.Value]


def run_in_segments(
    model: ir.Model, cases: Sequence[Mapping[str, Array]], limit: int | None = None
) -> list[dict[str, Array]]:
    """Run ``model`` in float32 on each case and return its graph outputs by name, per case.

    Args:
        model: a graph in topological order.
        cases: graph inputs by name.
        limit: bytes of weights per piece, as float32 (SEGMENT_BYTES by default); one node's weights are
            never split.

    Raises:
        EvaluationError: ONNX Runtime cannot load or run a piece.
    """
    live: list[dict[str, Array]] = [dict(case) for case in cases]
    segments = list(_split(model.graph, SEGMENT_BYTES if limit is None else limit))
    for index, segment in enumerate(segments):
        view = ir.GraphView(
            segment.inputs,
            segment.outputs,
            nodes=segment.nodes,
            initializers=tuple(segment.initializers),
            opset_imports=model.graph.opset_imports,
            name=f"segment_{index}",
        )
        part = ir.Model(view.clone(), ir_version=model.ir_version, functions=list(model.functions.values()))
        part.opset_imports.update(model.opset_imports)
        forget_shapes(part.graph)
        for value in part.graph.inputs:
            if value.dtype is None:  # operators that ONNX has no schema for; the data tells
                dtype = ir.DataType.from_numpy(live[0][str(value.name)].dtype)
                value.type = ir.TensorType(dtype)
        to_float32(part)
        graph = in_memory(part)
        try:
            session = graph.open(_options())
        except Exception as error:  # onnxruntime raises types of its own that it does not export
            raise EvaluationError(str(error).strip().splitlines()[0][:300]) from error
        names = [str(value.name) for value in segment.outputs]
        later = {str(value.name) for rest in segments[index + 1 :] for value in rest.inputs}
        later |= {str(value.name) for value in model.graph.outputs}
        for values in live:
            feeds = {info.name: values[info.name] for info in session.get_inputs()}
            try:
                results = session.run(names, feeds)
            except Exception as error:  # as above
                raise EvaluationError(str(error).strip().splitlines()[0][:300]) from error
            values.update(zip(names, results, strict=True))
            for name in [name for name in values if name not in later]:
                del values[name]
        del session, graph, part  # before the next piece is converted
    wanted = [str(value.name) for value in model.graph.outputs]
    return [{name: np.asarray(values[name]) for name in wanted} for values in live]


def _options() -> Any:
    """Session options that copy no weights: no prepacking, no arena."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    return options


def _split(graph: ir.Graph, limit: int) -> Iterator[_Segment]:
    groups: list[list[ir.Node]] = [[]]
    counted: set[ir.Value] = set()
    size = 0
    for node in graph:
        fresh = {v for v in node.inputs if v is not None and v.is_initializer()} - counted
        added = sum(float32_bytes(value.const_value) for value in fresh)
        if groups[-1] and size + added > limit:
            groups.append([])
            counted, size = set(), 0
        counted |= fresh
        size += added
        groups[-1].append(node)
    final = set(graph.outputs)
    for nodes in groups:
        inside = set(nodes)
        used = {value: None for node in nodes for value in _inputs(node)}
        made = [value for node in nodes for value in node.outputs]
        yield _Segment(
            nodes=nodes,
            inputs=[v for v in used if v.producer() not in inside and not v.is_initializer()],
            outputs=[v for v in made if v in final or any(n not in inside for n in v.consumers())],
            initializers=[v for v in used if v.is_initializer()],
        )


def _inputs(node: ir.Node) -> list[ir.Value]:
    """Values a node reads, those that its subgraphs take from outside included."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            own = {*inner.inputs, *inner.initializers.values(), *(v for n in inner for v in n.outputs)}
            values += [value for n in inner for value in _inputs(n) if value not in own]
    return values
