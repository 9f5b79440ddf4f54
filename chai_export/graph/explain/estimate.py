"""What a rewrite will take, said before the work starts; and whether the whole model can be compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from chai_export.graph.prove.float32 import float32_bytes
from chai_export.graph.prove.segments import SEGMENT_BYTES
from chai_export.graph.read.external_data import external_tensors

WHOLE_MODEL_BYTES = 8 * 2**30
"""In float32. The comparison runs both graphs once over all weights: about a second per GB on two cores."""
_BASE_BYTES = 700 * 2**20
"""Python, ONNX Runtime, the graphs themselves: 180 MB; with a tokenizer, which loads torch, 450 to 600 MB,
as the environment has it."""
_COPIES_GIVEN = 2
"""Of weights that ONNX Runtime cannot map from the file: ours, as float32, and its own."""
_COPIES_INLINE = 3
"""Of weights inside the ONNX file: the source, the rewritten graph, and one of them on its way to a file."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that a rewrite needs, and which proof will run.

    Attributes:
        weight_bytes: weights as stored.
        float32_bytes: weights as the proof computes with them.
        memory_bytes: resident memory at its peak, mapped pages of the weights included; an upper bound.
        disk_bytes: what the bundle takes where the file system cannot share blocks with the source.
        whole_model: whether the whole model is compared with the source, beyond every attention by itself.
    """

    weight_bytes: int
    float32_bytes: int
    memory_bytes: int
    disk_bytes: int
    whole_model: bool

    def describe(self) -> str:
        """One line for people."""
        proof = "attentions and whole model" if self.whole_model else "attentions, one by one"
        weights, memory, disk = map(_text, (self.weight_bytes, self.memory_bytes, self.disk_bytes))
        return (
            f"{weights} of weights; a rewrite takes up to {memory} of memory and {disk} of disk; "
            f"compared with the source: {proof}"
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers by name."""
        facts = asdict(self)
        facts["whole_model_proof"] = facts.pop("whole_model")
        return facts


def estimate(model: ir.Model, path: Path) -> Estimate:
    """Look at the sizes of the weights of ``model``, read from ``path``, without reading them."""
    import psutil

    tensors = [value.const_value for value in model.graph.initializers.values()]
    weights = [tensor for tensor in tensors if tensor is not None]
    stored = sum(tensor.nbytes for tensor in weights)
    float32 = sum(float32_bytes(tensor) for tensor in weights)
    inline = sum(tensor.nbytes for tensor in weights if not isinstance(tensor, ir.ExternalTensor))
    base = _BASE_BYTES + _COPIES_INLINE * inline
    whole = base + _piece_bytes(weights, float32, inline > 0) + _unpacked_bytes(model.graph)
    fits = float32 <= WHOLE_MODEL_BYTES and whole <= psutil.virtual_memory().available
    files = {path.resolve(), *(Path(tensor.path).resolve() for tensor in external_tensors(model))}
    disk = sum(file.stat().st_size for file in files)
    return Estimate(stored, float32, whole if fits else base, disk, fits)


def _piece_bytes(weights: list[ir.TensorProtocol], float32: int, inline: bool) -> int:
    """The largest piece of the whole-model comparison: mapped, or handed over in memory."""
    largest = max(map(float32_bytes, weights), default=0)
    converted = any(float32_bytes(tensor) != tensor.nbytes for tensor in weights)
    return (_COPIES_GIVEN if converted or inline else 1) * min(float32, max(largest, SEGMENT_BYTES))


def _unpacked_bytes(graph: ir.Graph) -> int:
    """The largest quantised matrix as float32: ONNX Runtime unpacks it to multiply."""
    sizes = [4 * _size(node, "K") * _size(node, "N") for node in graph if node.op_type == "MatMulNBits"]
    return max(sizes, default=0)


def _text(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _size(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None and attribute.type == ir.AttributeType.INT else 0
