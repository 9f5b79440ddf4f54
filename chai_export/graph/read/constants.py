"""Constants compared by value, whatever their rank and wherever they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_LARGEST = 4096
"""Elements; anything larger is a weight and is not looked at."""


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array behind a value if it is a small constant, through shape-only nodes and casts; else None."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is not None:
        return np.asarray(tensor.numpy()) if tensor.size <= _LARGEST else None
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in ("Identity", "Unsqueeze", "Squeeze", "Reshape"):
        inner = constant(node.inputs[0])
        # Only the value matters to callers, so the new shape need not be worked out unless it is known.
        return inner if inner is None or inner.size != 1 else inner.reshape(-1)
    if node.op_type == "Cast":
        inner = constant(node.inputs[0])
        return None if inner is None else inner.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    return None


def scalar(value: ir.Value | None) -> float | None:
    """The one number that a constant consists of, whatever its rank ([0.5] and 0.5 alike); else None."""
    array = constant(value)
    if array is None or array.size == 0 or array.dtype == np.bool_:
        return None
    first = float(array.flat[0])
    return first if array.size == 1 or bool((array == array.flat[0]).all()) else None


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant as a flat list of integers; else None."""
    array = constant(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(number) for number in array.flat]


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """Size of one axis if the graph states it as a number; symbolic sizes are unknown."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def rank(value: ir.Value | None) -> int | None:
    """Number of dims, or None if it is not known."""
    return None if value is None or value.shape is None else len(value.shape)
