"""Shapes and types of all values, where ONNX can infer them."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes import common


def infer_shapes(model: ir.Model) -> None:
    """State what can be inferred; a graph that ONNX cannot infer through keeps what it has.

    Nobody relies on a shape that is missing: its reader refuses with a reason of its own. So there is nothing
    to tell users, and what onnx_ir logs in that case is left out.
    """
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    before = logger.disabled
    logger.disabled = True
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        logger.disabled = before
