"""The native library on version 2: the table of cases, bad inputs, random calls, both ops."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chai_export.bench.paged_op import PagedOp
from chai_export.op.schema import SHARED_OP_TYPE
from chai_export.op.v2.attributes import Attributes
from chai_export.op.v2.cases import CACHES, CASES, TERM_CASES, Case, check
from chai_export.op.v2.reference import AttentionResult
from chai_export.op.v2.shared_cases import SharedCase, check_shared
from chai_export.op.v2.shared_reference import SharedAttentionResult
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY_V2, find_library
from tests.parity.test_native import DTYPES, instruction_sets

PATH = os.environ.get("CHAI_TEST_LIBRARY_V2")
LIBRARY = Path(PATH) if PATH else find_library(ONNXRUNTIME_LIBRARY_V2)
EVERY = (*CASES, *TERM_CASES)
by_name = {case.name: case for case in EVERY}

pytestmark = pytest.mark.skipif(
    LIBRARY is None and "CI" not in os.environ,
    reason="libchai_onnxruntime.so was not built; reinstall where a C++ compiler is",
)


def session(case, dtype, **options):
    return PagedOp(case.attributes, dtype, LIBRARY, sinks=case.sinks, slopes=case.slopes, **options)


def run(case, inputs, dtype="float32", *, in_place=False, threads=1):
    arrays = {name: array.copy() for name, array in inputs.items()}
    outputs = session(case, dtype, threads=threads).bind(arrays, in_place=in_place).run()
    caches = (outputs.get(f"present_{name}") for name in CACHES)
    return AttentionResult(outputs["output"], *caches, outputs["present_head_map"])


def run_shared(case, inputs, dtype="float32"):
    """The shared op; its inputs must come out unchanged."""
    arrays = {name: array.copy() for name, array in inputs.items()}
    outputs = session(case.producer, dtype, op_type=SHARED_OP_TYPE).bind(arrays, in_place=False).run()
    for name, array in inputs.items():
        assert array.tobytes() == arrays[name].tobytes(), name
    return SharedAttentionResult(**outputs)


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_library_agrees_with_reference(case, dtype):
    inputs = case.inputs(dtype)
    for in_place in (False, True):
        check(case, inputs, run(case, inputs, dtype, in_place=in_place, threads=2), dtype)


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_shared_op_agrees_with_reference(case):
    shared = SharedCase(case)
    inputs = shared.inputs()
    check_shared(shared, inputs, run_shared(shared, inputs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_instruction_set_passes_the_suite(monkeypatch, dtype):
    names = instruction_sets()
    assert names[-1] == "portable"
    for name in names:
        monkeypatch.setenv("CHAI_ISA", name)
        for case in EVERY:
            inputs = case.inputs(dtype)
            check(case, inputs, run(case, inputs, dtype), dtype)


@pytest.mark.parametrize("group", [4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_size_of_group_in_decode(monkeypatch, bits, group):
    """Groups that fill whole vectors are read directly, others through floats; 1, 2, … heads meet a row."""
    attributes = Attributes(key_bits=bits, value_bits=bits, group=group)
    for name in instruction_sets():
        monkeypatch.setenv("CHAI_ISA", name)
        for heads in (4, 8, 12, 20):
            rows = ((70, 1), (200, 1))
            case = Case(
                f"group_{heads}", heads, 4, 3, rows, 128, page=32, capacity=224, attributes=attributes
            )
            inputs = case.inputs()
            check(case, inputs, run(case, inputs))


def refused(case, inputs, message):
    """The call raises with this message, and the caches are as they were."""
    arrays = {name: array.copy() for name, array in inputs.items()}
    bound = session(case, "float32").bind(arrays, in_place=True)
    with pytest.raises(Exception, match=message):
        bound.run()
    for name in CACHES:
        if name in inputs:
            np.testing.assert_array_equal(arrays[name], inputs[name])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lengths", [8, 1], "row 0: lengths is 8, must be between 0 and 7"),
        ("past_lengths", [-3, 1], "row 0: past_lengths is -3, must not be negative"),
        ("past_lengths", [9, 24], "row 1: 24 cached and 1 new tokens exceed the capacity 24"),
        ("past_lengths", [2**31 - 1, 1], "row 0: 2147483647 cached and 7 new tokens exceed the capacity 24"),
        ("page_table", [[0, -1, 9], [4, 5, 6]], "row 0: page_table entry 1 is -1, the pool has 9 pages"),
        ("page_table", [[0, 9, 9], [4, 5, 6]], "row 0: page_table entry 1 is 9, the pool has 9 pages"),
        ("page_table", [[0, 1, -1], [4, 1, 6]], "row 0: page 1 is written to and stands in this call twice"),
        ("page_table", [[1, 1, -1], [4, 5, 6]], "row 0: page 1 is written to and stands in this call twice"),
    ],
)
def test_bad_rows_are_refused_before_anything_is_written(name, values, message):
    case = Case("bad_rows", 4, 4, 2, ((9, 7), (9, 1)))
    inputs = case.inputs()
    inputs[name] = np.array(values, np.int32)
    refused(case, inputs, message)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("key_cache", (9, 2, 8, 15), r"key_cache is \[9, 2, 8, 15\], expected \[9, 2, 8, 16\]"),
        ("value_cache", (8, 4, 8, 8), r"value_cache is \[8, 4, 8, 8\], expected \[9, 4, 8, 8\]"),
        ("key_scales", (9, 2, 8, 1), r"key_scales is \[9, 2, 8, 1\], expected \[9, 2, 8, 2\]"),
        ("value_scales", (9, 4, 8, 2), r"value_scales is \[9, 4, 8, 2\], expected \[9, 4, 8, 4\]"),
        ("page_table", (3, 3), r"page_table is \[3, 3\], expected \[2, 3\]"),
        ("value", (2, 3, 7, 16), r"value is \[2, 3, 7, 16\], expected \[2, 4, 7, 16\]"),
    ],
)
def test_bad_shapes_are_refused(name, shape, message):
    attributes = Attributes(key_bits=8, value_bits=4, group=8)
    case = Case("bad_shape", 4, 4, 2, ((9, 7), (9, 1)), attributes=attributes)
    inputs = case.inputs()
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    with pytest.raises(Exception, match=message):
        run(case, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe_tokens": 0}, "probe_tokens must be at least 1, got 0"),
        ({"window": -1}, "window must not be negative, got -1"),
        ({"softcap": float("nan")}, "softcap must be finite and not negative"),
        ({"group": 3}, "group must divide the head dim 16, got 3"),
    ],
)
def test_bad_attributes_are_refused(change, message):
    case = Case("bad_attribute", 4, 4, 2, ((0, 7),), attributes=Attributes(key_bits=8, group=8))
    inputs = case.inputs()
    wrong = replace(case, attributes=replace(case.attributes, **change))
    with pytest.raises(Exception, match=message):
        run(wrong, inputs)


def test_bits_that_are_not_what_the_cache_holds_are_refused():
    import onnxruntime

    from chai_export.op.model import one_node_model
    from chai_export.op.schema import OP_TYPE, signature
    from chai_export.op.v2.function import Form

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    types = {"T": "float32", "K": "int8", "V": "float32"}
    model = one_node_model(
        signature(OP_TYPE, 2), Attributes(key_bits=4).as_onnx(), types, absent=Form(8, 0).absent()
    )
    with pytest.raises(Exception, match="key_bits is 4, which is not what the type of the cache says"):
        onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


@st.composite
def calls(draw):
    """A case with any shapes, storages and terms, rows in any phase, some of them long enough for parts."""
    kv_heads = draw(st.integers(1, 6))
    tokens = draw(st.integers(1, draw(st.sampled_from([3, 12, 130]))))
    capacity = tokens + draw(st.integers(0, draw(st.sampled_from([4, 60, 900]))))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        new = draw(st.integers(0, tokens))
        rows.append((draw(st.one_of(st.just(0), st.integers(0, capacity - new))), new))
    group = draw(st.sampled_from([2, 4, 8, 16, 32]))
    heads = kv_heads * draw(st.integers(1, 3))
    attributes = Attributes(
        scale=draw(st.sampled_from([0.0, 0.2])),
        probe_tokens=draw(st.integers(1, 9)),
        online=draw(st.booleans()),
        key_bits=draw(st.sampled_from([0, 16, 8, 4])),
        value_bits=draw(st.sampled_from([0, 16, 8, 4])),
        group=group,
        window=draw(st.sampled_from([0, 0, 1, 7, 100])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
    )
    case = Case(
        f"fuzz{draw(st.integers(0, 99))}",
        heads,
        kv_heads,
        draw(st.integers(1, kv_heads)),
        tuple(rows),
        head_dim=group * draw(st.integers(1, 4)),
        value_dim=group * draw(st.integers(1, 4)),
        tokens=tokens,
        page=draw(st.sampled_from([1, 3, 16, 64, 1000])),
        capacity=capacity,
        twins=draw(st.sampled_from([0, 1, 2])),
        sinks=draw(st.booleans()),
        slopes=draw(st.booleans()),
        attributes=attributes,
    )
    # Twin heads stay twins only where nothing else tells them apart.
    return replace(case, sinks=False, slopes=False) if case.twins else case


@settings(
    max_examples=int(os.environ.get("CHAI_FUZZ_EXAMPLES", "60")),
    deadline=None,
    derandomize="CHAI_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(calls(), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([1, 2]))
def test_random_calls_agree_with_reference(case, dtype, in_place, threads):
    inputs = case.inputs(dtype)
    check(case, inputs, run(case, inputs, dtype, in_place=in_place, threads=threads), dtype)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_random_calls_of_the_shared_op_agree_with_reference(case):
    shared = SharedCase(case)
    inputs = shared.inputs()
    check_shared(shared, inputs, run_shared(shared, inputs))
