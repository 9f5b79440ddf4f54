"""Keep small constants from onnxscript's rules, which drop ``x + 0`` and ``x * 1`` within a tolerance.

To them 1e-8 is 0 and 1.000005 is 1: the epsilon of a norm disappears, and a row of zeros (the embedding of a
padding token) becomes NaN. What is nearly, but not exactly, 0 or 1 is a graph input while they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

_NEAR_ZERO, _NEAR_ONE = 1e-7, 1e-4
"""Ten times onnxscript's tolerances."""
_FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)  # fmt: skip


@contextmanager
def exact_scalars(model: ir.Model) -> Iterator[None]:
    """Hide scalars of the main graph that are nearly 0 or 1 inside the block; initializers afterwards."""
    graph = model.graph
    hidden: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or not _is_nearly_neutral(tensor):
            continue
        stand_in = ir.Value(name=f"{value.name}.exact", shape=ir.Shape(()), type=ir.TensorType(tensor.dtype))
        ir.convenience.replace_all_uses_with(value, stand_in)
        graph.inputs.append(stand_in)
        hidden.append((stand_in, tensor))
    try:
        yield
    finally:
        for stand_in, tensor in hidden:
            graph.inputs.remove(stand_in)
            if stand_in.uses():
                stand_in.const_value = tensor
                graph.register_initializer(stand_in)


def _is_nearly_neutral(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype not in _FLOATS or tensor.size != 1 or len(tensor.shape) != 0:
        return False
    number = float(tensor.numpy().item())
    return (0 < abs(number) <= _NEAR_ZERO) or (0 < abs(number - 1) <= _NEAR_ONE)
