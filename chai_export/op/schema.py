"""ONNX schema of chai::ClusteredHeadAttention, version 1, with type and shape inference."""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema, has, register_schema

DOMAIN = "chai"
OP_TYPE = "ClusteredHeadAttention"
VERSION = 1

DEFAULT_PROBE_TOKENS = 5

_INPUTS = (
    ("query", "T", "[B,H,S,D]: queries after RoPE."),
    ("key", "T", "[B,G,S,D]: keys of the new tokens, all KV heads, after RoPE."),
    ("value", "T", "[B,G,S,Dv]: values of the new tokens."),
    ("past_key", "T", "[B,R,C,D]: compact K cache; undefined at or past past_lengths and in unused slots."),
    ("past_value", "T", "[B,G,C,Dv]: full V cache; undefined at or past past_lengths."),
    ("past_head_map", "M", "[B,H]: query head to representative; read for rows that are not fresh."),
    ("past_lengths", "M", "[B]: tokens already in the cache."),
    ("lengths", "M", "[B]: valid new tokens, 0 … S; 0 is an inactive row."),
)
_OUTPUTS = (
    ("output", "T", "[B,S,H*Dv]: attended values; zero where the token index is at or past lengths."),
    ("present_key", "T", "[B,R,C,D]: past_key with the new rows of the kept heads appended."),
    ("present_value", "T", "[B,G,C,Dv]: past_value with the new rows appended."),
    ("present_head_map", "M", "[B,H]: the map used; an inactive row's map is passed through."),
)
INPUT_NAMES = tuple(name for name, _, _ in _INPUTS)
OUTPUT_NAMES = tuple(name for name, _, _ in _OUTPUTS)

_DOC = """Causal attention in which only representative heads compute scores (CHAI, arXiv 2403.08058).

The K cache holds the rows of R kept KV heads, the V cache those of all G. A fresh row (past_lengths 0,
lengths > 0, online 1) decides its head map from its first probe_tokens tokens, which themselves are computed
exactly; all later tokens of the row use the map. R = G is plain multi-head or grouped-query attention.
"""


def register_schema_once() -> None:
    """Register the schema with ``onnx``, so that its checker and shape inference know the op.

    Calling it again does nothing.
    """
    if not has(OP_TYPE, VERSION, DOMAIN):
        register_schema(_schema())


def _schema() -> OpSchema:
    attribute = OpSchema.Attribute
    schema = OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc=_DOC,
        inputs=[OpSchema.FormalParameter(name, type_, doc) for name, type_, doc in _INPUTS],
        outputs=[OpSchema.FormalParameter(name, type_, doc) for name, type_, doc in _OUTPUTS],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Activations and caches."),
            ("M", ["tensor(int32)"], "Maps and lengths."),
        ],
        attributes=[
            attribute("scale", onnx.helper.make_attribute("scale", 0.0), "Score factor; 0 means 1/sqrt(D)."),
            attribute(
                "probe_tokens",
                onnx.helper.make_attribute("probe_tokens", DEFAULT_PROBE_TOKENS),
                "Tokens whose probabilities decide the head map.",
            ),
            attribute("online", onnx.helper.make_attribute("online", 1), "1: cluster fresh rows."),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    """Outputs 1 … 3 have their pasts' types; output 0 is [B, S, H*Dv]."""
    for output, past in ((1, "past_key"), (2, "past_value"), (3, "past_head_map")):
        context.set_output_type(output, context.get_input_type(INPUT_NAMES.index(past)))
    query = context.get_input_type(INPUT_NAMES.index("query")).tensor_type
    value = context.get_input_type(INPUT_NAMES.index("value")).tensor_type
    output_type = onnx.TypeProto()
    output_type.tensor_type.elem_type = query.elem_type
    if query.HasField("shape") and value.HasField("shape"):
        if len(query.shape.dim) != 4 or len(value.shape.dim) != 4:
            raise onnx.shape_inference.InferenceError("query and value must have rank 4")
        heads, width = query.shape.dim[1], value.shape.dim[3]
        dims = output_type.tensor_type.shape.dim
        dims.add().CopyFrom(query.shape.dim[0])
        dims.add().CopyFrom(query.shape.dim[2])
        columns = dims.add()
        if heads.HasField("dim_value") and width.HasField("dim_value"):
            columns.dim_value = heads.dim_value * width.dim_value
    context.set_output_type(0, output_type)
