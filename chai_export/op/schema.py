"""The signatures of the ops of domain chai, and their ONNX schemas with type and shape inference."""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema, has, register_schema

from chai_export.op.attributes import DEFAULT_GROUP
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.op.probe import PAPER_PROBE_TOKENS
from chai_export.op.signature import VERSION, Attribute, Parameter, Signature

DOMAIN = "chai"
OP_TYPE = "ClusteredHeadAttention"
SHARED_OP_TYPE = "SharedClusteredHeadAttention"

_FLOATS = tuple(Dtype)
_TYPES = {
    "T": _FLOATS,
    "M": ("int32",),
    "K": (*_FLOATS, "int8", "uint8"),
    "V": (*_FLOATS, "int8", "uint8"),
    "F": ("float16",),
    "A": ("float32",),
}


def _of(name: str, type_: str, dims: str, meaning: str, *, optional: bool = False) -> Parameter:
    return Parameter(name, type_, tuple(dims.split()), meaning, optional)


def _continued(source: Parameter, meaning: str, name: str = "") -> Parameter:
    """The output that continues an input: ``past_x`` becomes ``present_x``, ``x`` too."""
    name = name or "present_" + source.name.removeprefix("past_")
    return Parameter(name, source.type, source.dims, meaning, source.optional, source.name)


_QUERY = _of("query", "T", "B H S D", "queries after RoPE.")
_KEY = _of("key", "T", "B G S D", "keys of the new tokens, all KV heads, after RoPE.")
_VALUE = _of("value", "T", "B G S Dv", "values of the new tokens.")
_PAST_HEAD_MAP = _of(
    "past_head_map", "M", "B H", "query head to representative; read for rows that are not fresh."
)
_PAST_LENGTHS = _of("past_lengths", "M", "B", "tokens already in the cache.")
_LENGTHS = _of("lengths", "M", "B", "valid new tokens, 0 … S; 0 is an inactive row.")
_OUTPUT = _of("output", "T", "B S H*Dv", "attended values; zero where the token index is at or past lengths.")
_MAP = _continued(_PAST_HEAD_MAP, "the map used; an inactive row's map is passed through.")
_PRODUCERS_KEY = _of(
    "key", "T", "B G S D", "the producer's new keys after RoPE; only the probe of a fresh row reads them."
)
_KEPT_HEAD_MAP = _of(
    "kept_head_map", "M", "B H", "the producer's present_head_map, which names the kept KV heads."
)

_KEY_CACHE = _of("key_cache", "K", "N R L Dk", "pool of pages of the compact K cache.")
_VALUE_CACHE = _of("value_cache", "V", "N G L Dw", "pool of pages of the full V cache.")
_KEY_SCALES = _of(
    "key_scales", "F", "N R L Sk", "scales (4 bits: and minima) of quantised keys.", optional=True
)
_VALUE_SCALES = _of("value_scales", "F", "N G L Sv", "likewise of quantised values.", optional=True)
_CACHES = (_KEY_CACHE, _VALUE_CACHE, _KEY_SCALES, _VALUE_SCALES)
_PAGE_TABLE = _of("page_table", "M", "B M", "page of positions j*L … j*L+L-1 of a row; -1: none.")
_TERMS = (
    _of("sinks", "T", "H", "a logit in the denominator of each softmax.", optional=True),
    _of("alibi_slopes", "A", "H", "bias per head and distance of the scores.", optional=True),
)

_ATTRIBUTES = (
    Attribute("scale", 0.0, "Score factor; 0 means 1/sqrt(D)."),
    Attribute("probe_tokens", PAPER_PROBE_TOKENS, "Tokens whose probabilities decide the head map."),
    Attribute("online", 1, "1: cluster fresh rows."),
    Attribute("key_bits", 0, "Storage of keys: 0 is T, 16 float16, 8 int8, 4 two codes a byte."),
    Attribute("value_bits", 0, "Storage of values, likewise."),
    Attribute("group", DEFAULT_GROUP, "Elements along the head dim that share a scale."),
    Attribute("window", 0, "Each token sees so many positions, itself included; 0: all."),
    Attribute("softcap", 0.0, "c of c*tanh(score/c); 0: none."),
)

_DOC = """Causal attention in which only representative heads compute scores (CHAI, arXiv 2403.08058).

The K cache holds the rows of R kept KV heads, the V cache those of all G. A fresh row (past_lengths 0,
lengths > 0, online 1) decides its head map from its first probe_tokens tokens, which themselves are computed
exactly; all later tokens of the row use the map. R = G is plain multi-head or grouped-query attention.

The caches are pools of pages, stored in T, float16, 8 or 4 bits.
"""

_SHARED_DOC = """ClusteredHeadAttention over the caches of an earlier layer, the producer.

Several layers that read one layer's keys and values are Cross-Layer Attention (arXiv 2405.12981).

It has no keys, values or caches of its own. The KV heads that the producer kept serve it too; which of their
query heads represents each head is decided from its own queries.
"""

_OWN = Signature(
    OP_TYPE,
    VERSION,
    _DOC,
    (_QUERY, _KEY, _VALUE, *_CACHES, _PAGE_TABLE, _PAST_HEAD_MAP, _PAST_LENGTHS, _LENGTHS, *_TERMS),
    (_OUTPUT, *(_continued(cache, f"{cache.name} with the new rows.") for cache in _CACHES), _MAP),
    _ATTRIBUTES,
    _TYPES,
)
_SHARED = Signature(
    SHARED_OP_TYPE,
    VERSION,
    _SHARED_DOC,
    (
        _QUERY,
        _PRODUCERS_KEY,
        _of("value", "T", "B G S Dv", "the producer's new values, likewise."),
        *_CACHES,
        _PAGE_TABLE,
        _KEPT_HEAD_MAP,
        _PAST_HEAD_MAP,
        _PAST_LENGTHS,
        _LENGTHS,
        *_TERMS,
    ),
    (_OUTPUT, _MAP),
    _ATTRIBUTES,
    _TYPES,
)
SIGNATURES: dict[str, Signature] = {each.op_type: each for each in (_OWN, _SHARED)}
"""Both ops by op type."""


def signature(op_type: str = OP_TYPE) -> Signature:
    """The signature of an op."""
    return SIGNATURES[op_type]


def register_schema_once() -> None:
    """Register the schemas with ``onnx``, so that its checker and shape inference know the ops.

    Calling it again does nothing.
    """
    if not has(OP_TYPE, VERSION, DOMAIN):
        for each in SIGNATURES.values():
            register_schema(_schema(each))


def _schema(of: Signature) -> OpSchema:
    def formal(parameter: Parameter) -> OpSchema.FormalParameter:
        kind = OpSchema.FormalParameterOption
        option = kind.Optional if parameter.optional else kind.Single
        return OpSchema.FormalParameter(parameter.name, parameter.type, parameter.text, param_option=option)

    used = dict.fromkeys(parameter.type for parameter in (*of.inputs, *of.outputs))
    schema = OpSchema(
        of.op_type,
        DOMAIN,
        of.version,
        doc=of.doc,
        inputs=[formal(parameter) for parameter in of.inputs],
        outputs=[formal(parameter) for parameter in of.outputs],
        type_constraints=[
            (name, [ELEMENT_TYPES[each].onnxruntime for each in of.types[name]], "") for name in used
        ],
        attributes=[
            OpSchema.Attribute(each.name, onnx.helper.make_attribute(each.name, each.default), each.meaning)
            for each in of.attributes
        ],
    )
    schema.set_type_and_shape_inference_function(lambda context: _infer(context, of))
    return schema


def _infer(context: onnx.shape_inference.InferenceContext, of: Signature) -> None:
    """An output that follows an input has its type; others get their sizes from the inputs' sizes."""
    known = _sizes(context, of)
    for index, parameter in enumerate(of.outputs[: context.get_num_outputs()]):
        if parameter.follows is not None:
            source = of.input_names.index(parameter.follows)
            if source < context.get_num_inputs() and context.get_input_type(source) is not None:
                context.set_output_type(index, context.get_input_type(source))
            continue
        type_ = onnx.TypeProto()
        same = next(i for i, each in enumerate(of.inputs) if each.type == parameter.type)
        type_.tensor_type.elem_type = context.get_input_type(same).tensor_type.elem_type
        if known:
            for name in parameter.dims:
                _set_dim(type_.tensor_type.shape.dim.add(), name, known)
        context.set_output_type(index, type_)


Dim = onnx.TensorShapeProto.Dimension


def _sizes(context: onnx.shape_inference.InferenceContext, of: Signature) -> dict[str, Dim]:
    """What each symbol is, from the first input that has it; empty unless every needed input has a shape."""
    known: dict[str, Dim] = {}
    for index, parameter in enumerate(of.inputs[: context.get_num_inputs()]):
        type_ = context.get_input_type(index)
        if type_ is None or not type_.tensor_type.HasField("shape"):
            continue
        dims = type_.tensor_type.shape.dim
        if len(dims) != len(parameter.dims):
            raise onnx.shape_inference.InferenceError(
                f"{parameter.name} must have rank {len(parameter.dims)}, got {len(dims)}"
            )
        for name, dim in zip(parameter.dims, dims, strict=True):
            known.setdefault(name, dim)
    return known


def _set_dim(dim: Dim, name: str, known: dict[str, Dim]) -> None:
    """The size that a product of symbols has, where all of them are numbers or there is only one."""
    factors = [known.get(each) for each in name.split("*")]
    if len(factors) == 1 and factors[0] is not None:
        dim.CopyFrom(factors[0])
    elif all(each is not None and each.HasField("dim_value") for each in factors):
        product = 1
        for each in factors:
            assert each is not None
            product *= each.dim_value
        dim.dim_value = product
