"""A matrix in blocks: the layout of com.microsoft.MatMulNBits, and the node that multiplies by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

BLOCKS, SCALES, ZERO_POINTS = "blocks", "scales", "zero_points"
"""The initializers of a matrix are named after it: ``model.layers.0.mlp.up_proj.weight.blocks``."""
COLUMNS: Final = "columns"
"""Ends the name of a matrix whose parameter is [in, out]: ``transformer.h.0.attn.c_attn.weight.columns``."""
DOMAIN: Final = "com.microsoft"
BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
"""What MatMulNBits takes: powers of two from 16."""


@dataclass(frozen=True)
class BlockWeight:
    """A matrix [out, in] of 4- or 8-bit codes; ``block`` codes along ``in`` share scale and zero point.

    element = (code - zero point) · scale; the last block is filled up with codes that nothing reads.

    Attributes:
        blocks: uint8 [out, ⌈in / block⌉, block · bits / 8], of 4 bits two codes a byte, the first one low.
        scales: float32 or float16 [out, ⌈in / block⌉].
        zero_points: uint8 [out, ⌈⌈in / block⌉ · bits / 8⌉], packed as codes are; or, in the type of the
            scales and of 4 bits only, [out, ⌈in / block⌉]; None where all are 2^(bits - 1). On CPUs ONNX
            Runtime has no fast kernel for those in floats.
        bits: 4 or 8.
        block: 16, 32, 64, 128 or 256.
        width: ``in``.

    Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """

    blocks: NDArray[np.uint8]
    scales: NDArray[np.floating]
    zero_points: NDArray[np.uint8] | NDArray[np.floating] | None
    bits: int
    block: int
    width: int

    def __post_init__(self) -> None:
        rows, count = len(self.blocks), -(-self.width // self.block)
        wanted = (rows, count, self.block * self.bits // 8)
        if self.bits not in (4, 8) or self.block not in BLOCK_SIZES or self.blocks.shape != wanted:
            raise ValueError(f"{self.bits} bits in blocks of {self.block}: {self.blocks.shape}, not {wanted}")
        if self.scales.shape != (rows, count):
            raise ValueError(f"scales are {self.scales.shape}, not {(rows, count)}")
        zeros = self.zero_points
        packed = zeros is not None and zeros.dtype == np.uint8
        if zeros is not None and zeros.shape != (rows, -(-count * self.bits // 8) if packed else count):
            raise ValueError(f"zero points are {zeros.shape} for scales {self.scales.shape}")
        if zeros is not None and not packed and self.bits == 8:
            raise ValueError("ONNX Runtime multiplies by 8 bits with zero points in 8 bits only")

    @classmethod
    def from_codes(
        cls,
        codes: NDArray[np.uint8],
        scales: NDArray[np.floating],
        zero_points: NDArray[np.uint8] | NDArray[np.floating] | None,
        *,
        bits: int,
    ) -> BlockWeight:
        """Pack a matrix that is given code by code.

        Args:
            codes: uint8 [out, in], each below 2^bits.
            scales: [out, in / block]; ``in`` must be a multiple of the block.
            zero_points: uint8 or float [out, in / block], not packed; None for 2^(bits - 1).
            bits: 4 or 8.
        """
        rows, width = codes.shape
        blocks = _pack(codes, bits).reshape(rows, scales.shape[1], -1)
        packed = zero_points is not None and zero_points.dtype == np.uint8
        zeros = _pack(zero_points, bits) if packed and zero_points is not None else zero_points
        return cls(blocks, scales, zeros, bits, width // scales.shape[1], width)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        parts = (self.blocks, self.scales, self.zero_points)
        return sum(part.nbytes for part in parts if part is not None)

    def codes(self) -> NDArray[np.uint8]:
        """uint8 [out, in], one code each."""
        return self._padded_codes()[:, : self.width]

    def _padded_codes(self) -> NDArray[np.uint8]:
        return _unpack(self.blocks.reshape(len(self.blocks), -1), self.bits)

    def dequantised(self) -> NDArray[np.float32]:
        """float32 [out, in]: the numbers that the codes stand for."""
        rows, count = self.scales.shape
        codes = self._padded_codes().reshape(rows, count, self.block)
        zeros: NDArray[np.float32] | float = float(2 ** (self.bits - 1))
        if self.zero_points is not None:
            packed = self.zero_points.dtype == np.uint8
            each = _unpack(self.zero_points, self.bits)[:, :count] if packed else self.zero_points
            zeros = each.astype(np.float32)[..., None]
        values = (codes.astype(np.float32) - zeros) * self.scales.astype(np.float32)[..., None]
        return np.ascontiguousarray(values.reshape(rows, -1)[:, : self.width], dtype=np.float32)


def block_product(
    graph: ir.Graph, activations: ir.Value, weight: BlockWeight, name: str, *, accuracy_level: int
) -> ir.Node:
    """The node ``activations · weightᵀ``: MatMulNBits, [.., in] to [.., out]. It is not in the graph yet.

    The initializers are registered in ``graph`` under ``name``; a weight that is there already is shared.

    Args:
        graph: gets the initializers; its model must import com.microsoft.
        activations: float32 or float16 [.., in], in the type of the scales.
        weight: the matrix.
        name: of the matrix, as in the model that it comes from.
        accuracy_level: 0 leaves the type of activations to ONNX Runtime, 1 is float32, 4 int8.
    """
    parts: dict[str, NDArray[np.generic] | None] = {
        BLOCKS: weight.blocks,
        SCALES: weight.scales,
        ZERO_POINTS: weight.zero_points,
    }
    inputs = [
        _initializer(graph, f"{name}.{part}", array) for part, array in parts.items() if array is not None
    ]
    node = ir.node(
        "MatMulNBits",
        [activations, *inputs],
        {
            "K": weight.width,
            "N": len(weight.blocks),
            "bits": weight.bits,
            "block_size": weight.block,
            "accuracy_level": accuracy_level,
        },
        domain=DOMAIN,
    )
    result = node.outputs[0]
    result.type = activations.type
    if activations.shape is not None:
        result.shape = ir.Shape([*list(activations.shape)[:-1], len(weight.blocks)])
    return node


def block_weight(node: ir.Node) -> BlockWeight | None:
    """The matrix of a MatMulNBits; None for another node, and for one with a bias or reordered columns."""
    if node.op_type != "MatMulNBits" or node.domain != DOMAIN or any(node.inputs[4:]):
        return None
    blocks, scales, zeros = (*(None if v is None else v.const_value for v in node.inputs[1:4]), None)[:3]
    if blocks is None or scales is None or (zeros is None and any(node.inputs[3:4])):
        return None
    sizes = {key: node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size")}
    rows = sizes["N"]
    return BlockWeight(
        blocks.numpy(),
        scales.numpy().reshape(rows, -1),
        None if zeros is None else zeros.numpy().reshape(rows, -1),
        sizes["bits"],
        sizes["block_size"],
        sizes["K"],
    )


def named_block_weight(node: ir.Node) -> tuple[str, BlockWeight] | None:
    """Name and matrix of a node that :func:`block_product` made; None for others."""
    stored = node.inputs[1] if node.op_type == "MatMulNBits" else None
    if stored is None or not str(stored.name).endswith(f".{BLOCKS}"):
        return None
    weight = block_weight(node)
    return None if weight is None else (str(stored.name).removesuffix(f".{BLOCKS}"), weight)


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(list(array.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _pack(codes: NDArray[np.generic], bits: int) -> NDArray[np.uint8]:
    """uint8 [rows, n] to [rows, ⌈n · bits / 8⌉]."""
    whole = np.ascontiguousarray(codes, dtype=np.uint8)
    if bits == 8:
        return whole
    if whole.shape[1] % 2:
        whole = np.pad(whole, ((0, 0), (0, 1)))
    return np.bitwise_or(whole[:, 0::2], np.left_shift(whole[:, 1::2], 4), dtype=np.uint8)


def _unpack(packed: NDArray[np.generic], bits: int) -> NDArray[np.uint8]:
    whole = packed.astype(np.uint8, copy=False)
    if bits == 8:
        return whole
    return np.stack([whole & 15, whole >> 4], axis=-1).reshape(len(whole), -1)
