"""The function bodies in ONNX Runtime and in onnx's reference, on the table of cases."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest

from chai_export.op.cases import CACHES, CASES, TERM_CASES, check
from chai_export.op.function import Form, function_proto
from chai_export.op.model import node_model, one_node_model
from chai_export.op.reference import AttentionResult
from chai_export.op.schema import OP_TYPE, SHARED_OP_TYPE, signature
from chai_export.op.shared_cases import SHARED_CASES, SHARED_TERM_CASES, check_shared
from chai_export.op.shared_reference import SharedAttentionResult
from chai_export.op.storage import BITS

EVERY = (*CASES, *TERM_CASES)
by_name = {case.name: case for case in EVERY}


def model_of(case, dtype, **options):
    return node_model(case.attributes, dtype, sinks=case.sinks, slopes=case.slopes, **options)


def result_of(outputs):
    caches = (outputs.get(f"present_{name}") for name in CACHES)
    return AttentionResult(outputs["output"], *caches, outputs["present_head_map"])


def run_onnxruntime(model, inputs):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_function_body_in_onnxruntime_agrees_with_reference(case):
    inputs = case.inputs()
    check(case, inputs, result_of(run_onnxruntime(model_of(case, "float32"), inputs)))


@pytest.mark.parametrize("name", ["mixed_phases", "mixed_phases_k16v16", "mixed_phases_everything_k8v4"])
def test_function_body_in_float16_agrees_with_reference(name):
    case = by_name[name]
    inputs = case.inputs("float16")
    check(case, inputs, result_of(run_onnxruntime(model_of(case, "float16"), inputs)), "float16")


@pytest.mark.parametrize("case", [*SHARED_CASES[::3], *SHARED_TERM_CASES], ids=lambda case: case.name)
def test_function_body_of_the_shared_op_agrees_with_reference(case):
    inputs = case.inputs()
    outputs = run_onnxruntime(model_of(case.producer, "float32", op_type=SHARED_OP_TYPE), inputs)
    check_shared(case, inputs, SharedAttentionResult(**outputs))


@pytest.mark.parametrize("case", [*SHARED_CASES, *SHARED_TERM_CASES], ids=lambda case: case.name)
def test_reference_of_the_shared_op_in_float32_agrees_with_float64(case):
    inputs = case.inputs()
    check_shared(case, inputs, case.reference(inputs, np.float32))


@pytest.mark.parametrize("opset", [18, 20, 23, 24])
@pytest.mark.parametrize("op_type", [OP_TYPE, SHARED_OP_TYPE])
def test_function_body_passes_the_checker_in_every_opset(opset, op_type):
    case = by_name["mixed_phases_everything_k8v4"]
    onnx.checker.check_model(model_of(case, "float32", opset=opset, op_type=op_type), full_check=True)


@pytest.mark.parametrize("name", ["mixed_phases", "twins_exact_ties_k4v4"])
def test_function_body_in_onnx_reference_agrees_with_reference(name):
    case = by_name[name]
    inputs = case.inputs()
    evaluator = onnx.reference.ReferenceEvaluator(model_of(case, "float32"))
    check(
        case, inputs, result_of(dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True)))
    )


def test_two_forms_stand_in_one_model():
    """Storage differs from layer to layer, and with it the body: nodes name theirs by overload."""
    first, second = by_name["mixed_phases_k8v4"], by_name["mixed_phases_k16v16"]
    models = [model_of(case, "float32") for case in (first, second)]
    for index, model in enumerate(models):
        onnx.compose.add_prefix(model, f"{index}.", inplace=True, rename_functions=False)
    both = models[0]
    for field in ("node", "input", "output"):
        getattr(both.graph, field).extend(getattr(models[1].graph, field))
    both.functions.extend(models[1].functions)
    assert {function.overload for function in both.functions} == {"k8v4", "k16v16"}
    inputs = [case.inputs() for case in (first, second)]
    feeds = {f"{index}.{name}": value for index, each in enumerate(inputs) for name, value in each.items()}
    outputs = run_onnxruntime(both, feeds)
    for index, case in enumerate((first, second)):
        of_case = {name[2:]: value for name, value in outputs.items() if name.startswith(f"{index}.")}
        check(case, inputs[index], result_of(of_case))


def test_a_form_names_what_its_nodes_do_not_have():
    assert Form().absent() == {
        "key_scales",
        "value_scales",
        "present_key_scales",
        "present_value_scales",
        "sinks",
        "alibi_slopes",
    }
    assert Form(8, 0, sinks=True).absent(SHARED_OP_TYPE) == {"value_scales", "alibi_slopes"}
    assert Form(8, 4, slopes=True, softcap=True).overload == "k8v4_slopes_softcap"


def test_an_older_opset_is_refused():
    with pytest.raises(ValueError, match="needs opset 18 or newer, got 17"):
        function_proto(17, Form())


def test_rows_outside_their_limits_stay_inside_the_buffers():
    """The body cannot raise: it must neither crash nor touch another row's pages."""
    case = by_name["mixed_phases"]
    inputs = case.inputs()
    bad = {name: value.copy() for name, value in inputs.items()}
    bad["past_lengths"][1] = 1 << 20
    bad["page_table"][2] = 1 << 20
    bad["past_head_map"][3] = 99
    model = one_node_model(
        signature(),
        case.attributes.as_onnx(),
        {"T": "float32", "K": "float32", "V": "float32"},
        function=function_proto(18, Form()),
        absent=Form().absent(),
    )
    outputs = run_onnxruntime(model, bad)
    expected = case.reference(inputs)
    for row in (0, 4):
        np.testing.assert_allclose(outputs["output"][row], expected.output[row], atol=1e-5)
    touched = {int(page) for row in (0, 4) for page in inputs["page_table"][row] if 0 <= page < 1 << 20}
    others = sorted(set(range(len(inputs["key_cache"]))) - touched)
    np.testing.assert_array_equal(outputs["present_value_cache"][others], inputs["value_cache"][others])


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


@pytest.mark.parametrize("op_type", [OP_TYPE, SHARED_OP_TYPE])
def test_function_bodies_leave_no_value_unused(op_type):
    forms = [*(Form(k, v) for k in BITS for v in BITS), Form(8, 4, sinks=True, slopes=True, softcap=True)]
    unused = {form.overload: unused_values(function_proto(18, form, op_type)) for form in forms}
    assert not {overload: names for overload, names in unused.items() if names}
