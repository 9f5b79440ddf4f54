"""What a rewrite will take, said before the work starts; and whether the whole model can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from chai_export.graph.segments import SEGMENT_BYTES

WHOLE_MODEL_BYTES = 8 * 2**30
"""In float32. The comparison runs both graphs once over all weights: about a second per GB on two cores."""
_BASE_BYTES = 700 * 2**20
"""Python, ONNX Runtime, the graphs themselves."""
_COPIES = 3
"""A piece's weights as read, as float32, and in ONNX Runtime."""
_GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Bytes of the weights as stored and as float32, expected resident memory, and which proof will run."""

    weight_bytes: int
    float32_bytes: int
    memory_bytes: int
    whole_model: bool

    def describe(self) -> str:
        """One line for people."""
        proof = "attentions and whole model" if self.whole_model else "attentions, one by one"
        return (
            f"{self.weight_bytes / _GB:.1f} GB of weights stay on disk, about {self.memory_bytes / _GB:.1f} "
            f"GB of memory needed, compared with the source: {proof}"
        )


def estimate(model: ir.Model) -> Estimate:
    """Look at the sizes of a model's weights, without reading them."""
    import psutil

    stored = float32 = largest = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        size = tensor.size * 4 if tensor.dtype.is_floating_point() else tensor.nbytes
        stored += tensor.nbytes
        float32 += size
        largest = max(largest, size)
    whole = _BASE_BYTES + _COPIES * min(float32, max(largest, 2 * SEGMENT_BYTES))
    fits = float32 <= WHOLE_MODEL_BYTES and whole <= psutil.virtual_memory().available
    return Estimate(stored, float32, whole if fits else _BASE_BYTES, fits)
