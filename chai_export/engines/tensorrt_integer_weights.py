"""Products with weights in 4 or 8 bits: MatMulNBits as DequantizeLinear with blocks and MatMul.

ONNX Runtime keeps unsigned numbers around a zero point, TensorRT signed ones around 0: they are written anew,
with the same scales. Activations stay in the type of the scales. Zero points other than the middle are taken
off as a second product, of the sums of each block of activations.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray

from chai_export.engines.tensorrt_writer import NodeWriter, refuse

_FLOAT = onnx.TensorProto.FLOAT
_SIGNED = {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}
_MIDDLE_BITS = {4: 0x88, 8: 0x80}
"""What turns a byte of unsigned numbers into signed ones: their first bits, the other way round."""
_ALIGNMENT = 4096


class IntegerWeights:
    """The file of signed weights; a context manager. It is made with the first weight."""

    def __init__(self, path: Path, location: str) -> None:
        self._path, self._location = path, location
        self._file: BinaryIO | None = None
        self.written: dict[str, str] = {}
        """Names of the signed weights by those they are made from."""

    def __enter__(self) -> IntegerWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def store(self, name: str, element: int, sizes: tuple[int, ...], data: bytes) -> onnx.TensorProto:
        """Append packed numbers, and return the tensor that refers to them."""
        if self._file is None:
            self._file = self._path.open("wb")
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        place = {"location": self._location, "offset": self._file.tell(), "length": len(data)}
        self._file.write(data)
        tensor = onnx.TensorProto(name=name, data_type=element, dims=sizes)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def multiply(writer: NodeWriter, node: onnx.NodeProto, integers: IntegerWeights) -> None:
    """Write one MatMulNBits: [..., K] times [K, N], the weights as [N, blocks, bytes]."""
    bits = int(writer.attribute("bits", 4))
    if bits not in _SIGNED:
        refuse(node, f"with {bits} bits")
    values, packed, scales, zeros, order, bias = (*node.input, *[""] * 6)[:6]
    if order:
        refuse(node, "with weights in another order (g_idx)")
    depth, width = int(writer.attribute("K", 0)), int(writer.attribute("N", 0))
    size = int(writer.attribute("block_size", 32))
    blocks = -(-depth // size)
    element = writer.element(scales)
    scales = _by_block(writer, scales, width, blocks)
    weights = writer.add(
        "DequantizeLinear",
        [_signed(writer, packed, bits, (width, blocks * size), integers), scales],
        axis=1,
        block_size=size,
    )
    weights = writer.add("Transpose", [weights], perm=[1, 0])
    if depth != blocks * size:
        ends = [writer.constant(np.array([number])) for number in (0, depth, 0)]
        weights = writer.add("Slice", [weights, *ends])
    product = writer.add("MatMul", [values, weights])
    if zeros:
        off = _zero_points(writer, zeros, bits, width, blocks) - (1 << (bits - 1))
        if off.any():
            taken = _of_blocks(writer, values, off * writer.array(scales).astype(np.float32), size, depth)
            product = writer.add("Sub", [product, writer.cast(taken, _FLOAT, element)])
    if bias:
        product = writer.add("Add", [product, bias])
    writer.rename(node.output[0])


def _signed(
    writer: NodeWriter, packed: str, bits: int, sizes: tuple[int, int], integers: IntegerWeights
) -> str:
    if packed not in integers.written:
        name = f"{packed}_int{bits}"
        numbers = writer.array(packed) ^ np.uint8(_MIDDLE_BITS[bits])
        writer.put(integers.store(name, _SIGNED[bits], sizes, numbers.tobytes()))
        integers.written[packed] = name
    return integers.written[packed]


def _by_block(writer: NodeWriter, scales: str, width: int, blocks: int) -> str:
    """The scales as [N, blocks]; older files have them in one row."""
    writer.array(scales)
    if writer.shape(scales) == [width, blocks]:
        return scales
    tensor = onnx.TensorProto()
    tensor.CopyFrom(writer.initializers[scales])
    tensor.name = f"{scales}_by_block"
    tensor.ClearField("dims")
    tensor.dims.extend([width, blocks])
    writer.put(tensor)
    return tensor.name


def _zero_points(writer: NodeWriter, zeros: str, bits: int, width: int, blocks: int) -> NDArray[np.float32]:
    """[N, blocks], from bytes of the same packing as the weights or from one number each."""
    array: NDArray[Any] = writer.array(zeros)
    if array.dtype != np.uint8:
        return array.reshape(width, blocks).astype(np.float32)
    array = array.reshape(width, -1)
    if bits == 4:
        array = np.stack([array & 15, array >> 4], -1).reshape(width, -1)
    return array[:, :blocks].astype(np.float32)


def _of_blocks(writer: NodeWriter, values: str, factors: NDArray[np.float32], size: int, depth: int) -> str:
    """Sums of each block of K values, times ``factors`` [N, blocks], in float32: [..., N]."""
    member = (np.arange(depth)[:, None] // size == np.arange(factors.shape[1])).astype(np.float32)
    exact = writer.add("Cast", [values], to=_FLOAT)
    sums = writer.add("MatMul", [exact, writer.constant(member)])
    return writer.add("MatMul", [sums, writer.constant(np.ascontiguousarray(factors.T))])
