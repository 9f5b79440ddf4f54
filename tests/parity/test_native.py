"""The native library for ONNX Runtime: the table of cases, bad inputs, random calls."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chai_export.bench.op_session import OpSession
from chai_export.op.attributes import Attributes
from chai_export.op.cases import CACHES, CASES, TERM_CASES, Case, check
from chai_export.op.reference import AttentionResult
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library

LIBRARY = Path(path) if (path := os.environ.get("CHAI_TEST_LIBRARY")) else find_library(ONNXRUNTIME_LIBRARY)
DTYPES = ("float32", "float16", "bfloat16")
EVERY = (*CASES, *TERM_CASES)
by_name = {case.name: case for case in EVERY}

pytestmark = pytest.mark.skipif(
    LIBRARY is None and "CI" not in os.environ,
    reason="libchai_onnxruntime.so was not built; reinstall where a C++ compiler is",
)


def session(case, dtype, **options):
    return OpSession(case.attributes, dtype, LIBRARY, sinks=case.sinks, slopes=case.slopes, **options)


def run(case, inputs, dtype="float32", *, in_place=False, threads=1):
    arrays = {name: array.copy() for name, array in inputs.items()}
    outputs = session(case, dtype, threads=threads).bind(arrays, in_place=in_place).run()
    caches = (outputs.get(f"present_{name}") for name in CACHES)
    return AttentionResult(outputs["output"], *caches, outputs["present_head_map"])


def instruction_sets():
    """What this processor has, from the line with which the library refuses an unknown name."""
    script = "import sys; from pathlib import Path; from chai_export.bench.op_session import OpSession; "
    script += "from chai_export.op.attributes import Attributes; "
    script += "OpSession(Attributes(), 'float32', Path(sys.argv[1]))"
    environment = os.environ | {"CHAI_ISA": "nonsense"}
    command = [sys.executable, "-c", script, str(LIBRARY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CHAI_ISA is 'nonsense', which this processor does not have" in done.stderr
    return done.stderr.split("use one of:")[1].split()


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_library_agrees_with_reference(case, dtype):
    inputs = case.inputs(dtype)
    for in_place in (False, True):
        check(case, inputs, run(case, inputs, dtype, in_place=in_place, threads=2), dtype)


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


def test_result_does_not_depend_on_threads_beyond_rounding():
    case = by_name["long_cache"]
    inputs = case.inputs()
    one, two = (run(case, inputs, threads=threads).output for threads in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbours():
    case = by_name["mixed_phases"]
    inputs = case.inputs()
    together = run(case, inputs)
    for row in range(len(case.rows)):
        of_row = {name: a if name in CACHES else a[row : row + 1].copy() for name, a in inputs.items()}
        alone = run(case, of_row)
        np.testing.assert_array_equal(alone.output, together.output[row : row + 1])
        np.testing.assert_array_equal(alone.present_head_map, together.present_head_map[row : row + 1])


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
        ("lengths", [7, -1], "row 1: lengths is -1, must be between 0 and 7"),
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
    ("entries", "message"),
    [
        ([0, 1, 2, 2], "row 1: the head map keeps 3 KV heads, the K cache has 2 slots"),
        ([0, 0, 4, 0], "row 1: head map entry 2 is 4, must be between 0 and 3"),
        ([0, 0, -2147483648, 0], "row 1: head map entry 2 is -2147483648"),
    ],
)
def test_bad_head_maps_are_refused_before_anything_is_written(entries, message):
    case = Case("bad_map", 4, 4, 2, ((0, 7), (9, 1)))
    inputs = case.inputs()
    inputs["past_head_map"][1] = entries
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
        ("key", (2, 4, 7, 15), r"key is \[2, 4, 7, 15\], expected \[2, 4, 7, 16\]"),
        ("past_head_map", (2, 3), r"past_head_map is \[2, 3\], expected \[2, 4\]"),
        ("lengths", (3,), r"lengths is \[3\], expected \[2\]"),
        ("past_lengths", (1,), r"past_lengths is \[1\], expected \[2\]"),
        ("query", (2, 6, 7, 16), "expected"),
        ("query", (2, 4, 0, 16), "expected"),
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
    "name", ["query", "key_cache", "page_table", "past_head_map", "past_lengths", "lengths"]
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_that_is_not_aligned_is_refused(name, dtype):
    """Whoever binds raw memory may bind any address; reading 4 bytes across a word is undefined."""
    case = Case("unaligned", 4, 4, 2, ((0, 7), (9, 1)))
    arrays = case.inputs(dtype)
    whole = arrays[name]
    place = np.zeros(whole.nbytes + 64, np.uint8)
    start = -place.ctypes.data % 64 + 1
    arrays[name] = place[start : start + whole.nbytes].view(whole.dtype).reshape(whole.shape)
    arrays[name][...] = whole
    bound = session(case, dtype).bind(arrays, in_place=True)
    with pytest.raises(Exception, match=f"{name} does not start at a multiple of {whole.itemsize} bytes"):
        bound.run()


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

    from chai_export.op.function import Form
    from chai_export.op.model import one_node_model
    from chai_export.op.schema import signature

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    types = {"T": "float32", "K": "int8", "V": "float32"}
    model = one_node_model(signature(), Attributes(key_bits=4).as_onnx(), types, absent=Form(8, 0).absent())
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
