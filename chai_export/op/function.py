"""ONNX function bodies: the ops on standard operators only.

A bundle carries those it needs as model-local functions, so that any ONNX runtime can run it without our
libraries, more slowly.
"""

from __future__ import annotations

from functools import lru_cache

import onnx
import onnx.parser

from chai_export.op import function_text as text
from chai_export.op.schema import DOMAIN, OP_TYPE, SHARED_OP_TYPE, signature

MIN_OPSET = 18
"""ReduceMin and ReduceMax take today's form, axes as an input, from opset 18."""


@lru_cache
def function_proto(opset: int, op_type: str = OP_TYPE) -> onnx.FunctionProto:
    """The function body of an op, importing the opset of the model it is to stand in.

    Args:
        opset: version of the default ONNX domain, at least 18.
        op_type: ClusteredHeadAttention or SharedClusteredHeadAttention.

    Raises:
        ValueError: the opset is older than 18.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"the function body needs opset {MIN_OPSET} or newer, got {opset}")
    of = signature(op_type)
    inputs, outputs, attributes = map(", ".join, (of.input_names, of.output_names, of.attribute_names))
    header = (
        f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n'
        f"{op_type} <{attributes}> ({inputs}) => ({outputs})\n"
    )
    return onnx.parser.parse_function(header + "{\n" + _BODIES[op_type] + "}\n")


_OWN_CACHE = (
    text.CONSTANTS
    + text.sizes("value", "past_key")
    + text.ROWS
    + text.PROBE
    + text.CHOSEN_MAP
    + text.MAP
    + text.slots("map")
    + text.APPEND
    + text.cached("present_key", "present_value")
    + text.ATTEND
)

_KEPT_MAP = """
  kept_map_any = Cast <to: int = 7> (kept_head_map)
  kept_map_low = Max (kept_map_any, zero)
  kept_map = Min (kept_map_low, last_head)
"""

_SHARED_CACHE = (
    text.CONSTANTS
    + text.sizes("value_cache", "key_cache")
    + text.ROWS
    + _KEPT_MAP
    + text.slots("kept_map")
    + text.PROBE
    + text.GIVEN_MAP
    + text.MAP
    + "  map_kv = Div (map, group_0)\n"
    + text.cached("key_cache", "value_cache")
    + text.ATTEND
)

_BODIES = {OP_TYPE: _OWN_CACHE, SHARED_OP_TYPE: _SHARED_CACHE}
