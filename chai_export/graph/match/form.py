"""The ways in which exporters write an attention."""

from __future__ import annotations

from enum import Enum


class Form(Enum):
    """One way of writing attention, by its letter; ``description`` says who writes it and how it looks."""

    A = "A", "torch.onnx.export (dynamo) of SDPA, opset 18 to 22: MatMul, Softmax, MatMul between two Muls"
    B = "B", "torch.onnx.export (dynamo) of eager attention, opset 18 to 22: MatMul, Mul, Softmax, MatMul"
    C = "C", "torch.onnx.export (dynamo), opset 23: Attention over a concatenated cache"
    D = "D", "torch.onnx.export (dynamo), opset 24: Attention over a concatenated cache"
    E = "E", "torch.onnx.export (dynamo), opset 24, of a static cache: ScatterND into it, then Attention"
    F = "F", "optimum (TorchScript): as A, with shape arithmetic and constants as nodes"
    G = "G", "onnxruntime-genai: GroupQueryAttention with rotary embedding inside"
    H = "H", "onnxruntime-genai: GroupQueryAttention behind RotaryEmbedding"
    I = "I", "onnxruntime-genai: MultiHeadAttention"  # noqa: E741
    J = "J", "onnxruntime-genai: as G with a window, sinks, a soft cap or norms; refused with other caches"
    K = "K", "newer builders: Attention that holds its cache, or TensorScatter into a fixed one"

    description: str

    def __new__(cls, letter: str, description: str) -> Form:
        """A member whose value is its letter."""
        member = object.__new__(cls)
        member._value_ = letter
        member.description = description
        return member
