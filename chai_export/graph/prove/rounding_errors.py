"""Put rounding errors into a graph, to see how far from each other two right computations of it may be.

Another order of summation, another batch or a fused kernel rounds every product otherwise. Here each product
gets such errors at its inputs and at its result; what that moves is what a comparison must allow.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from chai_export.graph.read.builder import Builder

_PRODUCTS = frozenset(
    {"MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
)
_QUANTISERS = frozenset({"DynamicQuantizeLinear", "QuantizeLinear"})
"""What they round goes into products of integers."""
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (ir.DataType.FLOAT, *_HALVES)
FLOAT_ERROR = 2.0**-23
"""Of a float32 row's root mean square: sums of many products are off by some units."""
TIE_ERROR = 2.0**-12
"""Likewise before activations are rounded to 8 bits: about one number in a hundred goes the other way."""
_HALF_ERROR = 2.0**-12
"""Of the number itself, whose last bit that moves."""
_AXES_ARE_INPUTS = 18
_SCATTER = 12345.678
"""So many radians are the row's root mean square: neighbouring numbers get unrelated errors. ONNX Runtime has
no RandomNormalLike for new opsets, and this is the same in every run."""
_LEAST = 1e-30


def add_rounding_errors(model: ir.Model, dtype: ir.DataType, size: float = FLOAT_ERROR) -> None:
    """Let every product of the main graph round otherwise, in place.

    Errors of float32 go with the row, as a sum's error goes with its largest terms, those of float16 and
    bfloat16 with the number.

    Args:
        model: a graph in topological order.
        dtype: what values of unstated type are.
        size: of the errors of float32 values.
    """
    errors = _Errors(model, size)
    for node in list(model.graph):
        if node.op_type in _PRODUCTS | _QUANTISERS:
            value = node.inputs[0]
            if value is not None and value.const_value is None and (value.dtype or dtype) in _FLOATS:
                node.replace_input_with(0, errors.added(value, value.dtype or dtype))
        if node.op_type in _PRODUCTS:
            result = node.outputs[0]
            if not result.is_graph_output() and (result.dtype or dtype) in _FLOATS:
                readers = [(use.node, use.idx) for use in result.uses()]
                moved = errors.added(result, result.dtype or dtype)
                for reader, index in readers:
                    reader.replace_input_with(index, moved)
    model.graph.sort()


class _Errors:
    """Makes the nodes that add errors, each time others."""

    def __init__(self, model: ir.Model, size: float) -> None:
        self._size = size
        self._builder = Builder(model.graph)
        self._op = self._builder.op
        self._axes_are_inputs = model.opset_imports.get("", 0) >= _AXES_ARE_INPUTS
        self._count = 0

    def added(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` of type ``dtype`` with errors."""
        self._count += 1
        half = dtype in _HALVES
        wide = self._op("Cast", value, to=ir.DataType.FLOAT) if half else value
        row = self._row_size(wide)
        scattered = self._op("Mul", self._op("Div", wide, row), self._number(_SCATTER))
        errors = self._op("Sin", self._op("Add", scattered, self._number(self._count)))
        # A sine's root mean square is the root of a half.
        scale = self._number(2.0**0.5 * (_HALF_ERROR if half else self._size))
        size = self._op("Mul", wide if half else row, scale)
        moved = self._op("Add", wide, self._op("Mul", errors, size))
        return self._op("Cast", moved, to=dtype) if half else moved

    def _row_size(self, value: ir.Value) -> ir.Value:
        """The root mean square of each row, [..., 1]; never 0."""
        squares = self._op("Mul", value, value)
        if self._axes_are_inputs:
            mean = self._op("ReduceMean", squares, self._builder.integers(-1))
        else:
            mean = self._op("ReduceMean", squares, axes=[-1])
        return self._op("Max", self._op("Sqrt", mean), self._number(_LEAST))

    def _number(self, number: float) -> ir.Value:
        return self._builder.constant(np.array(number, np.float32), "rounding_errors")
