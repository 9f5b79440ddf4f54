"""Shapes and types of all values, where ONNX can infer them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


def infer_shapes(model: ir.Model) -> None:
    """State what can be inferred; a graph that ONNX cannot infer through keeps what it has."""
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
