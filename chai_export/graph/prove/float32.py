"""Turn a 16-bit graph into a float32 one, so that comparisons show errors of meaning and not of rounding.

ONNX Runtime has no bfloat16 operators on CPUs, so this is also what makes such graphs runnable there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def to_float32(model: ir.Model) -> None:
    """Retype every 16-bit float value, initializer and cast to float32, in place."""
    _to_float32(model.graph)


def _to_float32(graph: ir.Graph) -> None:
    for value in [*graph.inputs, *graph.initializers.values()]:
        _retype(value)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _HALVES:
            value.const_value = ir.Tensor(np.asarray(tensor.numpy()).astype(np.float32), name=value.name)
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # the file's pages, which would otherwise stay mapped and resident
    for node in graph:
        for output in node.outputs:
            _retype(output)
        for name in ("to", "dtype", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is None or attribute.type != ir.AttributeType.INT:
                continue
            if ir.DataType(attribute.as_int()) in _HALVES:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.GRAPH:
                _to_float32(attribute.as_graph())
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALVES:
                array = np.asarray(attribute.as_tensor().numpy()).astype(np.float32)
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(array))


def float32_bytes(tensor: ir.TensorProtocol | None) -> int:
    """Bytes of a weight once it is converted."""
    if tensor is None:
        return 0
    return tensor.size * 4 if tensor.dtype in _HALVES else tensor.nbytes


def _retype(value: ir.Value) -> None:
    if value.dtype in _HALVES:
        value.type = ir.TensorType(ir.DataType.FLOAT)
