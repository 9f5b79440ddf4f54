"""Graphs of onnxruntime's quantize_dynamic for TensorRT, which has no operators on integer activations.

Weights stay in 8 bits. Activations are not rounded: DynamicQuantizeLinear goes, its scale becomes 1, and
products are of the numbers themselves. Logits differ from ONNX Runtime's by what that rounding does.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from chai_export.engines.tensorrt_integer_weights import IntegerWeights
from chai_export.engines.tensorrt_writer import NodeWriter, refuse

_MIDDLE = 128
_BYTES = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)


def quantise(writer: NodeWriter, node: onnx.NodeProto, _: IntegerWeights) -> None:
    """DynamicQuantizeLinear: x as it is, for the products that :func:`multiply` writes."""
    for reader in writer.readers(node.output[0]):
        if reader.op_type != "MatMulInteger":
            refuse(node, f"for {reader.op_type}")
    writer.put(onnx.numpy_helper.from_array(np.array(1, np.float32), node.output[1]))


def multiply(writer: NodeWriter, node: onnx.NodeProto, integers: IntegerWeights) -> None:
    """MatMulInteger of what DynamicQuantizeLinear made and weights [K, N], in float32."""
    quantised, weights, _, zero = (*node.input, "", "")[:4]
    maker = writer.maker(quantised)
    if maker is None or maker.op_type != "DynamicQuantizeLinear":
        refuse(node, f"whose input {quantised} is not from DynamicQuantizeLinear")
    values = maker.input[0]
    one = writer.constant(np.float32(1))
    table = writer.add("DequantizeLinear", [_signed(writer, weights, integers), one])
    product = writer.add("MatMul", [values, table])
    off = _offset(writer, weights, zero)
    if off.any():
        row = np.broadcast_to(off.reshape(1, -1), (1, writer.array(weights).shape[-1]))
        total = writer.add("ReduceSum", [values, writer.constant(np.array([-1]))], keepdims=1)
        taken = writer.add("Mul", [total, writer.constant(np.ascontiguousarray(row))])
        product = writer.add("Sub", [product, taken])
    writer.rename(node.output[0])


def gather(writer: NodeWriter, node: onnx.NodeProto, _: IntegerWeights) -> None:
    """A Gather of integers that become floats afterwards waits for :func:`dequantise`."""
    if _waits(writer, node) is None:
        writer.nodes.append(node)


def dequantise(writer: NodeWriter, node: onnx.NodeProto, integers: IntegerWeights) -> None:
    """DequantizeLinear of gathered rows: the rows are gathered from floats."""
    before = writer.maker(node.input[0])
    if before is None or before.op_type != "Gather" or _waits(writer, before) is not node:
        writer.nodes.append(node)
        return
    table, indices = before.input
    scale, zero = (*node.input[1:], "")[:2]
    floats = writer.add("DequantizeLinear", [_signed(writer, table, integers), scale])
    axis = next((a.i for a in before.attribute if a.name == "axis"), 0)
    rows = writer.add("Gather", [floats, indices], axis=axis)
    off = _offset(writer, table, zero)
    if off.any():
        shift = (off * writer.array(scale)).astype(writer.array(scale).dtype)
        writer.add("Sub", [rows, writer.constant(shift)])
    writer.rename(node.output[0])


def _waits(writer: NodeWriter, gather: onnx.NodeProto) -> onnx.NodeProto | None:
    """The node that makes floats of what ``gather`` takes from a table in 8 bits with one scale."""
    table = writer.initializers.get(gather.input[0])
    readers = writer.readers(gather.output[0])
    if table is None or table.data_type not in _BYTES or len(readers) != 1:
        return None
    after = readers[0]
    single = after.op_type == "DequantizeLinear" and not list(writer.initializers[after.input[1]].dims)
    return after if single else None


def _signed(writer: NodeWriter, name: str, integers: IntegerWeights) -> str:
    """Numbers in 8 bits as signed ones around 0."""
    array = writer.array(name)
    if array.dtype == np.int8:
        return name
    if name not in integers.written:
        numbers = array ^ np.uint8(_MIDDLE)
        sizes = tuple(array.shape)
        signed = f"{name}_int8"
        writer.put(integers.store(signed, onnx.TensorProto.INT8, sizes, numbers.tobytes()))
        integers.written[name] = signed
    return integers.written[name]


def _offset(writer: NodeWriter, weights: str, zero: str) -> NDArray[np.float32]:
    """What is to be taken off signed numbers: the zero point, seen from the middle of unsigned ones."""
    unsigned = writer.array(weights).dtype == np.uint8
    point = writer.array(zero).astype(np.float32) if zero else np.float32(0)
    return np.asarray(point - (_MIDDLE if unsigned else 0), np.float32)
