"""The op: schema, reference and function body, on the one table of cases."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper

from chai_export.op.cases import CASES, Case, check, check_output
from chai_export.op.function import function_proto
from chai_export.op.head_map import (
    choose_kv_heads,
    distances,
    greedy_order,
    probe_probabilities,
    quantise,
    squared_distances,
)
from chai_export.op.model import node_model
from chai_export.op.reference import AttentionResult, clustered_head_attention
from chai_export.op.schema import register_schema_once, signature

by_name = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def model_of(case: Case, dtype: str, **options: Any) -> onnx.ModelProto:
    return node_model(case.attributes(), dtype, **options)


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reference_in_float32_agrees_with_float64(case, dtype):
    inputs = case.inputs(dtype)
    check(case, inputs, case.reference(inputs, np.float32), dtype)


def test_check_allows_rounding_where_values_cancel_out_and_no_more():
    exact = np.full((1, 1, 1), -1.19e-4)
    lengths = np.ones(1, np.int32)
    check_output("cancelled", exact + 2.8e-8, exact, lengths, "float32")
    with pytest.raises(AssertionError, match="differs by 1e-06"):
        check_output("wrong", exact + 1e-6, exact, lengths, "float32")


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_function_body_in_onnxruntime_agrees_with_reference(case, dtype):
    import onnxruntime

    inputs = case.inputs(dtype)
    session = onnxruntime.InferenceSession(
        model_of(case, dtype).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    check(case, inputs, AttentionResult(*session.run(list(signature().output_names), inputs)), dtype)


@pytest.mark.parametrize("name", ["mixed_phases", "h8_g2_r1", "twins_exact_ties", "offline", "right_padding"])
def test_function_body_in_onnx_reference_agrees_with_reference(name):
    case = by_name[name]
    inputs = case.inputs()
    evaluator = onnx.reference.ReferenceEvaluator(model_of(case, "float32"))
    check(case, inputs, AttentionResult(*evaluator.run(list(signature().output_names), inputs)))


@pytest.mark.parametrize("opset", [18, 20, 23, 24])
def test_function_body_passes_the_checker_and_runs_in_every_opset(opset):
    import onnxruntime

    case = by_name["mixed_phases"]
    model = model_of(case, "float32", opset=opset)
    onnx.checker.check_model(model, full_check=True)
    inputs = case.inputs()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    check(case, inputs, AttentionResult(*session.run(list(signature().output_names), inputs)))


def test_function_body_refuses_an_opset_it_was_not_written_for():
    with pytest.raises(ValueError, match="opset 18"):
        function_proto(17)


def unused_values(body: onnx.FunctionProto) -> set[str]:
    """Values of a function that neither a node, a subgraph nor an output reads."""
    produced = {name for node in body.node for name in node.output if name}
    used = set(body.output)
    nodes = list(body.node)
    while nodes:
        node = nodes.pop()
        used.update(node.input)
        for attribute in node.attribute:
            nodes.extend(attribute.g.node)
            used.update(output.name for output in attribute.g.output)
    return produced - used


def test_function_body_leaves_no_value_unused():
    assert not unused_values(function_proto(18))


def test_schema_infers_types_and_shapes():
    register_schema_once()
    register_schema_once()
    model = model_of(by_name["h8_g2_r1"], "float16", with_function=False)
    del model.graph.output[1:]
    for name, dims in (("query", ["B", 8, "S", 16]), ("value", ["B", 2, "S", 12])):
        value = next(v for v in model.graph.input if v.name == name)
        value.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT16, dims))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("output", TensorProto.FLOAT16, [None] * 3))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    output = inferred.graph.output[0].type.tensor_type
    assert [d.dim_param or d.dim_value for d in output.shape.dim] == ["B", "S", 8 * 12]
    present = {v.name: v.type.tensor_type for v in inferred.graph.value_info}
    assert [d.dim_param for d in present["present_key"].shape.dim] == ["B", "R", "C", "D"]
    assert present["present_head_map"].elem_type == TensorProto.INT32


def test_keeping_every_head_gives_the_identity_map():
    for name in ("h4_g4_r4", "h8_g2_r2", "h6_g3_r3"):
        case = by_name[name]
        result = case.reference(case.inputs())
        assert result.present_head_map[0].tolist() == list(range(case.heads))


def line_distances(points: list[int]) -> np.ndarray:
    return np.abs(np.subtract.outer(points, points)).astype(np.int64)


def test_every_choice_is_made_once_more():
    distance = line_distances([0, 1, 2, 10, 11, 3])
    assert sorted(greedy_order(distance, 6, 2)[0]) == [2, 3]
    assert sorted(choose_kv_heads(distance, 6, 2)) == [1, 3]


def test_distances_are_absolute():
    quantised = np.array([[[0, 3]], [[1, 5]]], dtype=np.int32)
    assert distances(quantised).tolist() == [[0, 3], [3, 0]]
    assert squared_distances(quantised).tolist() == [[0, 5], [5, 0]]


def test_cases_tell_choosing_twice_from_choosing_once_and_absolute_from_squared():
    once = squared = 0
    for case in CASES:
        inputs = case.inputs()
        for b, (past, new) in enumerate(case.rows):
            if case.online and past == 0 and new > 0:
                probe = min(case.probe_tokens, new)
                scale = case.scale or case.head_dim**-0.5
                u = quantise(
                    probe_probabilities(inputs["query"][b, :, :probe], inputs["key"][b, :, :probe], scale)
                )
                chosen = set(choose_kv_heads(distances(u), case.kv_heads, case.kept))
                once += chosen != set(greedy_order(distances(u), case.kv_heads, case.kept)[0])
                squared += chosen != set(choose_kv_heads(squared_distances(u), case.kv_heads, case.kept))
    assert once >= 3
    assert squared >= 3


def test_twins_are_found_as_clusters():
    case = by_name["twins_exact_ties"]
    result = case.reference(case.inputs())
    assert result.present_head_map.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [99, 1]}, "lengths is 99"),
        ({"lengths": [-1, 1]}, "lengths is -1"),
        ({"past_lengths": [-2, 3]}, "must not be negative"),
        ({"past_lengths": [0, 22]}, "exceed the capacity"),
        ({"past_head_map": [[0] * 8, [0, 1, 2, 3, 4, 5, 6, 9]]}, "between 0 and 7"),
        ({"past_head_map": [[0] * 8, [0, 1, 2, 3, 4, 5, 6, 7]]}, "keeps 2 KV heads, the K cache has 1"),
    ],
)
def test_reference_refuses_rows_that_make_no_sense(change, message):
    case = by_name["h8_g2_r1"]
    inputs = case.inputs()
    inputs.update({name: np.array(value, dtype=np.int32) for name, value in change.items()})
    before = {name: value.copy() for name, value in inputs.items()}
    with pytest.raises(ValueError, match=message):
        clustered_head_attention(**inputs)
    for name, value in inputs.items():
        assert np.array_equal(value, before[name], equal_nan=value.dtype.kind == "f")


def test_check_notices_every_kind_of_damage():
    case = by_name["right_padding"]
    inputs = case.inputs()
    good = case.reference(inputs, np.float32)
    for field, index in (
        ("output", (0, 0, 0)),
        ("output", (0, 5, 0)),
        ("present_key", (1, 0, 20, 3)),
        ("present_value", (1, 0, 0, 3)),
        ("present_head_map", (0, 1)),
    ):
        damaged = getattr(good, field).copy()
        damaged[index] = 1
        if (damaged == getattr(good, field)).all():
            damaged[index] = 2
        with pytest.raises(AssertionError, match=case.name):
            check(case, inputs, dataclasses.replace(good, **{field: damaged}))
