"""The types of tensors that the project knows, with the name that each library has for them.

Nothing is imported but NumPy, and that on first use: the command line reads this module for its help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chai_export.choice import Choice

if TYPE_CHECKING:
    import numpy as np


class Dtype(Choice):
    """What a model's weights, activations and caches are stored in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class ElementType:
    """One type of tensor elements.

    Attributes:
        name: as NumPy and torch call it.
        item_size: bytes of one element.
        onnx: number in ``onnx.TensorProto.DataType`` and ``onnx_ir.DataType``.
        onnxruntime: type of a graph's input or output, ``tensor(…)``, also in ONNX schemas.
        tensorrt: member of ``tensorrt.DataType``.
        triton: in the signature of a kernel in the Triton language.
    """

    name: str
    item_size: int
    onnx: int
    onnxruntime: str
    tensorrt: str
    triton: str

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype, bfloat16 from ``ml_dtypes``, which is imported only then."""
        import numpy as np

        if self.name == Dtype.BFLOAT16:
            import ml_dtypes

            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        return np.dtype(self.name)


ELEMENT_TYPES = {
    element.name: element
    for element in (
        ElementType("float32", 4, 1, "tensor(float)", "FLOAT", "fp32"),
        ElementType("float16", 2, 10, "tensor(float16)", "HALF", "fp16"),
        ElementType("bfloat16", 2, 16, "tensor(bfloat16)", "BF16", "bf16"),
        ElementType("int8", 1, 3, "tensor(int8)", "INT8", "i8"),
        ElementType("uint8", 1, 2, "tensor(uint8)", "UINT8", "u8"),
        ElementType("int32", 4, 6, "tensor(int32)", "INT32", "i32"),
        ElementType("int64", 8, 7, "tensor(int64)", "INT64", "i64"),
    )
}
"""By name; members of :class:`Dtype` are keys too."""
