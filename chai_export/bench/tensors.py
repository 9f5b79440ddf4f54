"""NumPy arrays as ONNX Runtime values without a copy, bfloat16 included."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


def ort_value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """A value on top of the array's memory: what ONNX Runtime writes into it is in the array.

    Args:
        array: C-contiguous, of a dtype in :data:`ONNX_TYPES`. It must outlive the value.
    """
    if not array.flags.c_contiguous:
        raise ValueError("only contiguous arrays can be shared with ONNX Runtime")
    bits = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_TYPES[array.dtype.name])
