"""The signatures: the C++ header made from them, the schemas, and what shape inference says."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from chai_export.op.attributes import Attributes
from chai_export.op.cpp_header import header
from chai_export.op.model import node_model, one_node_model
from chai_export.op.schema import DOMAIN, SIGNATURES, register_schema_once, signature

HEADER = Path(__file__).parents[2] / "plugins/include/chai/op_schema.h"
EVERY = pytest.mark.parametrize("of", SIGNATURES.values(), ids=lambda of: of.op_type)


def test_the_cpp_header_is_made_from_the_signatures():
    assert HEADER.read_text() == header(), (
        "run `python -m chai_export.op.cpp_header > plugins/include/chai/op_schema.h`"
    )


@EVERY
def test_the_registered_schema_has_names_defaults_and_optional_inputs(of):
    register_schema_once()
    schema = onnx.defs.get_schema(of.op_type, of.version, DOMAIN)
    assert [each.name for each in schema.inputs] == list(of.input_names)
    assert [each.name for each in schema.outputs] == list(of.output_names)
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    assert [each.option == optional for each in schema.inputs] == [each.optional for each in of.inputs]
    defaults = {
        name: onnx.helper.get_attribute_value(a.default_value) for name, a in schema.attributes.items()
    }
    assert defaults == {each.name: each.default for each in of.attributes}


@EVERY
def test_outputs_continue_inputs_of_the_same_type_and_shape(of):
    inputs = {each.name: each for each in of.inputs}
    for output in of.outputs:
        if output.follows is not None:
            assert (output.type, output.dims) == (inputs[output.follows].type, inputs[output.follows].dims)
            assert output.optional == inputs[output.follows].optional


def inferred(sizes: dict[str, int], *, types=(), absent=()) -> dict[str, onnx.TypeProto.Tensor]:
    """Types of the outputs of one node whose inputs have the given sizes and whose outputs have none."""
    register_schema_once()
    of = signature()
    attributes = {each.name: each.default for each in of.attributes}
    known = {"T": "float16", "K": "float16", "V": "float16", **dict(types)}
    model = one_node_model(of, attributes, known, absent=absent)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    for value in model.graph.output:
        value.type.Clear()
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    return {value.name: value.type.tensor_type for value in graph.output}


def dims(type_: onnx.TypeProto.Tensor) -> list[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in type_.shape.dim]


def test_shape_inference_multiplies_heads_and_width_and_keeps_symbols():
    types = inferred({"H": 8, "Dv": 16, "N": 12})
    assert dims(types["output"]) == ["B", "S", 128]
    assert dims(types["present_key_cache"]) == [12, "R", "L", "Dk"]
    assert types["present_head_map"].elem_type == TensorProto.INT32
    assert isinstance(dims(inferred({"H": 8})["output"])[2], str)


def test_shape_inference_with_quantised_and_absent_caches():
    absent = ("value_scales", "present_value_scales", "sinks", "alibi_slopes")
    types = inferred({"H": 8, "Dv": 16}, types={"K": "int8"}, absent=absent)
    assert dims(types["output"]) == ["B", "S", 128]
    assert types["present_key_cache"].elem_type == TensorProto.INT8
    assert dims(types["present_key_scales"]) == ["N", "R", "L", "Sk"]
    assert types["present_key_scales"].elem_type == types["output"].elem_type == TensorProto.FLOAT16


def test_shape_inference_refuses_a_wrong_rank():
    register_schema_once()
    model = node_model(Attributes(), "float32", with_function=False)
    del model.graph.input[1].type.tensor_type.shape.dim[0]
    with pytest.raises(Exception, match="key must have rank 4, got 3"):
        onnx.shape_inference.infer_shapes(model, strict_mode=True)
