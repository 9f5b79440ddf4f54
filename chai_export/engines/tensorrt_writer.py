"""Writing nodes in the place of one that goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray

from chai_export.errors import ChaiError


class NodeWriter:
    """Collects the nodes of a graph anew; :meth:`finish` puts them in.

    Between :meth:`enter` of a node and the next, names of values are derived from that node's first output.
    """

    def __init__(self, model: onnx.ModelProto, directory: Path) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._model = model
        self._directory = str(directory)
        graph = model.graph
        infos = (*graph.value_info, *graph.input, *graph.output)
        self._infos = {info.name: info.type.tensor_type for info in infos}
        self._taken = {name for node in graph.node for name in (*node.input, *node.output)}
        self._taken |= self.initializers.keys() | self._infos.keys()
        self._makers = {name: node for node in graph.node for name in node.output}
        self._replaced: set[str] = set()
        self._node = onnx.NodeProto()

    def enter(self, node: onnx.NodeProto) -> None:
        """``node`` is the one to be replaced, or kept as it is, from here on."""
        self._node = node
        self._replaced.update(node.input)

    def attribute(self, name: str, otherwise: Any) -> Any:
        """An attribute of the node that is replaced."""
        found = [a for a in self._node.attribute if a.name == name]
        return onnx.helper.get_attribute_value(found[0]) if found else otherwise

    def add(
        self, op_type: str, inputs: Sequence[str], *, output: str | None = None, **attributes: Any
    ) -> str:
        """Write a node with one output, and return the name of that."""
        name = output or self._fresh(op_type)
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def cast(self, name: str, source: int, target: int) -> str:
        """A value in another element type; the value itself if it has that type."""
        return name if source == target else self.add("Cast", [name], to=target)

    def constant(self, array: NDArray[Any] | np.generic) -> str:
        """Write an array as an initializer, and return its name."""
        name = self._fresh("constant")
        self.put(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def put(self, tensor: onnx.TensorProto) -> None:
        """Write an initializer."""
        self._taken.add(tensor.name)
        self.initializers[tensor.name] = tensor

    def array(self, name: str) -> NDArray[Any]:
        """The values of an initializer.

        Raises:
            ChaiError: it is none.
        """
        if name not in self.initializers:
            refuse(self._node, f"whose input {name} is computed")
        return onnx.numpy_helper.to_array(self.initializers[name], self._directory)

    def element(self, name: str) -> int:
        """Element type of a value.

        Raises:
            ChaiError: it is unknown.
        """
        found = (
            self.initializers[name].data_type
            if name in self.initializers
            else self._infos[name].elem_type
            if name in self._infos
            else 0
        )
        if found == onnx.TensorProto.UNDEFINED:
            refuse(self._node, f"whose input {name} has no known type")
        return found

    def shape(self, name: str) -> list[int | str]:
        """Sizes of a value, or their names.

        Raises:
            ChaiError: their number is unknown.
        """
        if name in self.initializers:
            return list(self.initializers[name].dims)
        if name not in self._infos or not self._infos[name].HasField("shape"):
            refuse(self._node, f"whose input {name} has no known shape")
        sizes = self._infos[name].shape.dim
        return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in sizes]

    def rename(self, name: str) -> None:
        """Give the output of the node that was written last the name of the one it replaces."""
        last = self.nodes[-1]
        last.output[0] = last.name = name

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node of the graph as it was that makes a value."""
        return self._makers.get(name)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes of the graph as it was that read a value."""
        return [node for node in self._model.graph.node if name in _reads(node)]

    def require_opset(self, version: int) -> None:
        """The model is of this version of ONNX's operators or a later one."""
        for opset in self._model.opset_import:
            if opset.domain in ("", "ai.onnx"):
                opset.version = max(opset.version, version)

    def finish(self) -> None:
        """Put the nodes and initializers into the model; those that only replaced nodes read go."""
        graph = self._model.graph
        read = {name for node in self.nodes for name in _reads(node)}
        read |= {output.name for output in graph.output}
        dead = self._replaced - read
        kept = [tensor for name, tensor in self.initializers.items() if name not in dead]
        # Types of values that changed theirs are not kept; nobody needs the others.
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(kept)

    def _fresh(self, what: str) -> str:
        stem, number = f"{self._node.output[0]}/{what}", 0
        while (name := f"{stem}_{number}") in self._taken:
            number += 1
        self._taken.add(name)
        return name


def refuse(node: onnx.NodeProto, how: str) -> NoReturn:
    """Raise for a node that has no equal in TensorRT; ``how`` it is used says why.

    Raises:
        ChaiError: always.
    """
    raise ChaiError(
        f"the graph uses {node.op_type} {how} ({node.name or node.output[0]}), which TensorRT cannot do; "
        "export the model with `chai-export export`, or use --backend onnxruntime"
    )


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those of its subgraphs included."""
    inner = (nested for a in node.attribute for graph in (a.g, *a.graphs) for nested in graph.node)
    return set(node.input).union(*map(_reads, inner))
