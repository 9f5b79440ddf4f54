"""Make nodes: a small helper so that rewrites read like the graph they write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from chai_export.graph.read.omitted_outputs import omit_outputs


class Builder:
    """Creates nodes and constants at the end of ``graph``; the caller sorts the graph afterwards."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: dict[tuple[int, ...] | int, ir.Value] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        outputs: tuple[str, ...] = (),
        overload: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Append a node and return its first output; ``outputs`` names them all, "" leaves one out."""
        values = [ir.Value(name=output) for output in outputs] or [ir.Value(name=name)]
        node = ir.node(
            op_type, inputs, attributes or None, domain=domain, overload=overload, outputs=values, name=name
        )
        omit_outputs([value for value, output in zip(values, outputs, strict=False) if not output])
        self.graph.append(node)
        return node.outputs[0]

    def integers(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self._constant(tuple(numbers), np.array(numbers, dtype=np.int64))

    def integer(self, number: int) -> ir.Value:
        """A constant int64 scalar."""
        return self._constant(number, np.array(number, dtype=np.int64))

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        """A constant of any type; ``name`` gets a number behind it if it is taken."""
        unique, number = name, 0
        while unique in self.graph.initializers:
            number += 1
            unique = f"{name}.{number}"
        tensor = ir.Tensor(array, name=unique)
        value = ir.Value(
            name=unique, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _constant(self, key: tuple[int, ...] | int, array: Any) -> ir.Value:
        if key not in self._constants:
            name = "int64_" + "_".join(str(n).replace("-", "m") for n in np.atleast_1d(array))
            name += "" if array.ndim else "_scalar"
            while name in self.graph.initializers:
                existing = self.graph.initializers[name]
                if existing.const_value is not None and np.array_equal(existing.const_value.numpy(), array):
                    self._constants[key] = existing
                    return existing
                name += "_"
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=ir.Tensor(array, name=name),
            )
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]


def graph_input(name: str, dtype: ir.DataType, dims: list[str | int]) -> ir.Value:
    """A value to be put among the inputs of a graph."""
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
