"""Quantise a matrix in blocks by ONNX Runtime's own quantisers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chai_export.arguments import shown
from chai_export.choice import Choice
from chai_export.errors import UsageError
from chai_export.graph.weights.block_weight import BlockWeight

OFFERED_BLOCKS = (32, 128)


class Method(Choice):
    """How codes are chosen.

    rtn   the nearest code between the least and the largest number of a block.
    hqq   Half-Quadratic Quantization (Badri and Shaji, 2023): zero points that make the error sparse.
    """

    RTN = "rtn"
    HQQ = "hqq"


class WeightType(Choice):
    """What weights are stored as instead of floats."""

    INT4 = "int4"
    INT8 = "int8"


@dataclass(frozen=True)
class WeightFormat:
    """What weights are quantised to: 4 or 8 ``bits``, in blocks of 32 or 128 codes, by a method."""

    bits: int
    block: int = 32
    method: Method = Method.RTN

    @classmethod
    def asked(
        cls, weights: WeightType | str | None, block: int = 32, method: Method | str = Method.RTN
    ) -> WeightFormat | None:
        """From words; None where weights stay floats.

        Raises:
            UsageError: another word, or another size of blocks.
        """
        method = Method(method)
        if block not in OFFERED_BLOCKS or isinstance(block, bool):
            raise UsageError(f"--weight-block is {shown(block)}; give one of 32 and 128")
        if weights is None:
            return None
        return cls(4 if WeightType(weights) is WeightType.INT4 else 8, block, method)

    @property
    def name(self) -> str:
        """As in a manifest: "int4" or "int8"."""
        return f"int{self.bits}"

    def quantise(self, weight: NDArray[np.floating]) -> BlockWeight:
        """A float32 or float16 matrix [out, in] in blocks, with scales of its type."""
        return _hqq(weight, self) if self.method is Method.HQQ else _nearest(weight, self)


def _nearest(weight: NDArray[np.floating], form: WeightFormat) -> BlockWeight:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(form.block, is_symmetric=False, bits=form.bits)
    quantiser = DefaultWeightOnlyQuantizer(config)
    blocks, scales, zeros = quantiser.qbits_block_quant(np.ascontiguousarray(weight.T))
    return BlockWeight(blocks, scales, zeros, form.bits, form.block, weight.shape[1])


def _hqq(weight: NDArray[np.floating], form: WeightFormat) -> BlockWeight:
    """Zero points are rounded to codes, and the numbers once more: the fast kernels read no others."""
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        HQQWeightOnlyQuantConfig,
        HQQWeightOnlyQuantizer,
    )

    quantiser = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(form.block, bits=form.bits))
    matrix = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
    _, scales, zeros = quantiser.quantize_internal(matrix, bits=form.bits, group_size=form.block)
    most = 2**form.bits - 1
    rows, width = matrix.shape
    stored = scales.numpy().astype(weight.dtype)
    points = zeros.round().clamp(0, most)
    padded = torch.nn.functional.pad(matrix, (0, -width % form.block)).reshape(rows, -1, form.block)
    factors = torch.from_numpy(stored.astype(np.float32))[..., None]
    codes = (padded / factors + points[..., None]).round().clamp(0, most).reshape(rows, -1)
    packed = BlockWeight.from_codes(
        codes.to(torch.uint8).numpy(), stored, points.to(torch.uint8).numpy(), bits=form.bits
    )
    return BlockWeight(packed.blocks, stored, packed.zero_points, form.bits, form.block, width)
