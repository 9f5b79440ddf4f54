"""Hand a model to ONNX Runtime without a file: its bytes, and its weights where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from chai_export.graph.read.external_data import external_tensors

if TYPE_CHECKING:
    from chai_export.runtime.onnxruntime_model import GraphInMemory

_HANDED_OVER = 2**16
"""Bytes from which on a weight is given to ONNX Runtime beside the model's bytes."""


def in_memory(model: ir.Model) -> GraphInMemory:
    """The model as ONNX Runtime can open it; ``model`` is of no use for anything else afterwards.

    Weights of one directory are left there to be mapped. Those that were converted, and those in another
    directory than the first, are handed over as arrays: in the model's bytes they would be copied once more.
    """
    import onnxruntime as ort

    from chai_export.runtime.onnxruntime_model import GraphInMemory

    directory = next((str(tensor.base_dir) for tensor in external_tensors(model)), "")
    weights: dict[str, object] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if isinstance(tensor, ir.ExternalTensor):
            if str(tensor.base_dir) == directory:
                continue
        elif tensor.nbytes < _HANDED_OVER or tensor.dtype != ir.DataType.FLOAT:
            continue
        array = np.ascontiguousarray(tensor.numpy())
        weights[name] = ort.OrtValue.ortvalue_from_numpy(array)
        shape = ir.Shape(array.shape)
        value.const_value = ir.ExternalTensor(
            "handed over", 0, array.nbytes, tensor.dtype, shape=shape, name=name
        )
    data = ir.serde.serialize_model(model).SerializeToString()
    return GraphInMemory(data, directory, weights)
