"""ONNX schemas of the ops of domain chai, version 1, with type and shape inference."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx.defs import OpSchema, has, register_schema

DOMAIN = "chai"
OP_TYPE = "ClusteredHeadAttention"
SHARED_OP_TYPE = "SharedClusteredHeadAttention"
VERSION = 1

DEFAULT_PROBE_TOKENS = 5

Parameters = tuple[tuple[str, str, str], ...]
"""Name, type variable and meaning of each input or output."""

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
_SHARED_INPUTS = (
    ("query", "T", "[B,H,S,D]: queries after RoPE."),
    ("key", "T", "[B,G,S,D]: the producer's new keys after RoPE; only the probe of a fresh row reads them."),
    ("key_cache", "T", "[B,R,C,D]: the producer's present_key."),
    ("value_cache", "T", "[B,G,C,Dv]: the producer's present_value."),
    ("kept_head_map", "M", "[B,H]: the producer's present_head_map, which names the kept KV heads."),
    ("past_head_map", "M", "[B,H]: query head to representative; read for rows that are not fresh."),
    ("past_lengths", "M", "[B]: tokens in the cache before this call."),
    ("lengths", "M", "[B]: valid new tokens, 0 … S; 0 is an inactive row."),
)
_SHARED_OUTPUTS = (_OUTPUTS[0], _OUTPUTS[3])

INPUT_NAMES = tuple(name for name, _, _ in _INPUTS)
OUTPUT_NAMES = tuple(name for name, _, _ in _OUTPUTS)
SHARED_INPUT_NAMES = tuple(name for name, _, _ in _SHARED_INPUTS)
SHARED_OUTPUT_NAMES = tuple(name for name, _, _ in _SHARED_OUTPUTS)
SIGNATURES = {
    OP_TYPE: (INPUT_NAMES, OUTPUT_NAMES),
    SHARED_OP_TYPE: (SHARED_INPUT_NAMES, SHARED_OUTPUT_NAMES),
}
"""Names of inputs and of outputs of each op."""

_DOC = """Causal attention in which only representative heads compute scores (CHAI, arXiv 2403.08058).

The K cache holds the rows of R kept KV heads, the V cache those of all G. A fresh row (past_lengths 0,
lengths > 0, online 1) decides its head map from its first probe_tokens tokens, which themselves are computed
exactly; all later tokens of the row use the map. R = G is plain multi-head or grouped-query attention.
"""

_SHARED_DOC = """ClusteredHeadAttention over the caches of an earlier layer, the producer.

Several layers that read one layer's keys and values are Cross-Layer Attention (arXiv 2405.12981).

It has no keys, values or caches of its own. The KV heads that the producer kept serve it too; which of their
query heads represents each head is decided from its own queries.
"""


def register_schema_once() -> None:
    """Register the schemas with ``onnx``, so that its checker and shape inference know the ops.

    Calling it again does nothing.
    """
    if not has(OP_TYPE, VERSION, DOMAIN):
        register_schema(_schema(OP_TYPE, _DOC, _INPUTS, _OUTPUTS, _infer))
        register_schema(_schema(SHARED_OP_TYPE, _SHARED_DOC, _SHARED_INPUTS, _SHARED_OUTPUTS, _infer_shared))


def _schema(
    op_type: str,
    doc: str,
    inputs: Parameters,
    outputs: Parameters,
    infer: Callable[[onnx.shape_inference.InferenceContext], None],
) -> OpSchema:
    attribute = OpSchema.Attribute
    schema = OpSchema(
        op_type,
        DOMAIN,
        VERSION,
        doc=doc,
        inputs=[OpSchema.FormalParameter(*parameter) for parameter in inputs],
        outputs=[OpSchema.FormalParameter(*parameter) for parameter in outputs],
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
    schema.set_type_and_shape_inference_function(infer)
    return schema


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    """Outputs 1 … 3 have their pasts' types; output 0 is [B, S, H*Dv]."""
    for output, past in ((1, "past_key"), (2, "past_value"), (3, "past_head_map")):
        context.set_output_type(output, context.get_input_type(INPUT_NAMES.index(past)))
    _infer_output(context, INPUT_NAMES.index("value"))


def _infer_shared(context: onnx.shape_inference.InferenceContext) -> None:
    """Output 1 has its past's type; output 0 is [B, S, H*Dv]."""
    context.set_output_type(1, context.get_input_type(SHARED_INPUT_NAMES.index("past_head_map")))
    _infer_output(context, SHARED_INPUT_NAMES.index("value_cache"))


def _infer_output(context: onnx.shape_inference.InferenceContext, value_index: int) -> None:
    query = context.get_input_type(0).tensor_type
    value = context.get_input_type(value_index).tensor_type
    output_type = onnx.TypeProto()
    output_type.tensor_type.elem_type = query.elem_type
    if query.HasField("shape") and value.HasField("shape"):
        if len(query.shape.dim) != 4 or len(value.shape.dim) != 4:
            raise onnx.shape_inference.InferenceError("queries and values must have rank 4")
        heads, width = query.shape.dim[1], value.shape.dim[3]
        dims = output_type.tensor_type.shape.dim
        dims.add().CopyFrom(query.shape.dim[0])
        dims.add().CopyFrom(query.shape.dim[2])
        columns = dims.add()
        if heads.HasField("dim_value") and width.HasField("dim_value"):
            columns.dim_value = heads.dim_value * width.dim_value
    context.set_output_type(0, output_type)
