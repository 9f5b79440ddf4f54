"""NumPy arrays as ONNX Runtime values without a copy, bfloat16 included."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from chai_export.op.dtypes import ELEMENT_TYPES


def ort_value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """A value on top of the array's memory: what ONNX Runtime writes into it is in the array.

    Args:
        array: C-contiguous, of a type in :data:`~chai_export.op.dtypes.ELEMENT_TYPES`. It must outlive the
            value.
    """
    if not array.flags.c_contiguous:
        raise ValueError("only contiguous arrays can be shared with ONNX Runtime")
    bits = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ELEMENT_TYPES[array.dtype.name].onnx)
