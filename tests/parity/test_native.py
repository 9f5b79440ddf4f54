"""The native library for ONNX Runtime on the op's case suite, on bad inputs and on random calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chai_export.bench.op_session import OpSession
from chai_export.op.cases import CASES, Case, check
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library

LIBRARY = Path(path) if (path := os.environ.get("CHAI_TEST_LIBRARY")) else find_library(ONNXRUNTIME_LIBRARY)
DTYPES = ("float32", "float16", "bfloat16")
DEFAULTS = {"scale": 0.0, "probe_tokens": 5, "online": 1}
by_name = {case.name: case for case in CASES}

pytestmark = pytest.mark.skipif(
    LIBRARY is None and "CI" not in os.environ,
    reason="libchai_onnxruntime.so was not built; reinstall where a C++ compiler is",
)


def run(case, inputs, dtype, *, in_place=False, threads=1):
    arrays = {name: array.copy() for name, array in inputs.items()}
    session = OpSession(case.attributes(), dtype, LIBRARY, threads=threads)
    return session.bind(arrays, in_place=in_place).run()


def instruction_sets():
    """What this processor has, from the line with which the library refuses an unknown name."""
    script = "import sys; from pathlib import Path; from chai_export.bench.op_session import OpSession; "
    script += f"OpSession({DEFAULTS}, 'float32', Path(sys.argv[1]))"
    environment = os.environ | {"CHAI_ISA": "nonsense"}
    command = [sys.executable, "-c", script, str(LIBRARY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CHAI_ISA is 'nonsense', which this processor does not have" in done.stderr
    return done.stderr.split("use one of:")[1].split()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in_place"])
def test_library_agrees_with_reference(case, dtype, in_place):
    inputs = case.inputs(dtype)
    check(case, inputs, run(case, inputs, dtype, in_place=in_place, threads=2), dtype)


def test_every_instruction_set_passes_the_suite(monkeypatch):
    names = instruction_sets()
    assert names[-1] == "portable"
    for name in names:
        monkeypatch.setenv("CHAI_ISA", name)
        for dtype in DTYPES:
            for case in CASES:
                inputs = case.inputs(dtype)
                check(case, inputs, run(case, inputs, dtype), dtype)


def test_result_does_not_depend_on_threads_beyond_rounding():
    case = by_name["long_cache"]
    inputs = case.inputs()
    one, two = (run(case, inputs, "float32", threads=threads).output for threads in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbours():
    case = by_name["mixed_phases"]
    inputs = case.inputs()
    together = run(case, inputs, "float32")
    for row in range(len(case.rows)):
        alone = run(case, {name: array[row : row + 1].copy() for name, array in inputs.items()}, "float32")
        np.testing.assert_array_equal(alone.output, together.output[row : row + 1])
        np.testing.assert_array_equal(alone.present_head_map, together.present_head_map[row : row + 1])


def refused(case, inputs, message):
    """The call raises with this message, and the caches are as they were."""
    arrays = {name: array.copy() for name, array in inputs.items()}
    bound = OpSession(case.attributes(), "float32", LIBRARY).bind(arrays, in_place=True)
    with pytest.raises(Exception, match=message):
        bound.run()
    for name in ("past_key", "past_value"):
        np.testing.assert_array_equal(arrays[name], inputs[name])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lengths", [8, 1], "row 0: lengths is 8, must be between 0 and 7"),
        ("lengths", [7, -1], "row 1: lengths is -1, must be between 0 and 7"),
        ("past_lengths", [-3, 1], "row 0: past_lengths is -3, must not be negative"),
        ("past_lengths", [0, 24], "row 1: 24 cached and 1 new tokens exceed the capacity 24"),
        ("past_lengths", [2**31 - 1, 1], "row 0: 2147483647 cached and 7 new tokens exceed the capacity 24"),
    ],
)
def test_bad_lengths_are_refused_before_anything_is_written(name, values, message):
    case = Case("bad_lengths", 4, 4, 2, ((0, 7), (9, 1)))
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
        ("key", (2, 4, 7, 15), r"key is \[2, 4, 7, 15\], expected \[2, 4, 7, 16\]"),
        ("value", (2, 3, 7, 16), r"value is \[2, 3, 7, 16\], expected \[2, 4, 7, 16\]"),
        ("past_key", (2, 5, 24, 16), "the K cache has 5 slots for 4 KV heads"),
        ("past_key", (2, 2, 23, 16), r"past_value is \[2, 4, 24, 16\], expected \[2, 4, 23, 16\]"),
        ("past_value", (1, 4, 24, 16), r"past_value is \[1, 4, 24, 16\]"),
        ("past_head_map", (2, 3), r"past_head_map is \[2, 3\], expected \[2, 4\]"),
        ("lengths", (3,), r"lengths is \[3\], expected \[2\]"),
        ("past_lengths", (1,), r"past_lengths is \[1\], expected \[2\]"),
        ("query", (2, 6, 7, 16), "expected"),
        ("query", (2, 4, 0, 16), "expected"),
    ],
)
def test_bad_shapes_are_refused(name, shape, message):
    case = Case("bad_shape", 4, 4, 2, ((0, 7), (9, 1)))
    inputs = case.inputs()
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    with pytest.raises(Exception, match=message):
        run(case, inputs, "float32")


@pytest.mark.parametrize("name", ["query", "past_key", "past_head_map", "past_lengths", "lengths"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_that_is_not_aligned_is_refused(name, dtype):
    """Whoever binds raw memory may bind any address; reading 4 bytes across a word is undefined."""
    case = Case("unaligned", 4, 4, 2, ((0, 7), (9, 1)))
    arrays = {
        each: array.astype(dtype if array.ndim == 4 else np.int32) for each, array in case.inputs().items()
    }
    whole = arrays[name]
    place = np.zeros(whole.nbytes + 64, np.uint8)
    start = -place.ctypes.data % 64 + 1
    arrays[name] = place[start : start + whole.nbytes].view(whole.dtype).reshape(whole.shape)
    arrays[name][...] = whole
    bound = OpSession(case.attributes(), dtype, LIBRARY).bind(arrays, in_place=True)
    with pytest.raises(Exception, match=f"{name} does not start at a multiple of {whole.itemsize} bytes"):
        bound.run()


def test_bad_attribute_is_refused():
    case = Case("bad_probe", 4, 4, 2, ((0, 7),))
    inputs = case.inputs()
    session = OpSession(DEFAULTS | {"probe_tokens": 0}, "float32", LIBRARY)
    with pytest.raises(Exception, match="probe_tokens must be at least 1, got 0"):
        session.bind(inputs, in_place=False).run()


@st.composite
def calls(draw):
    """A case with any shapes, rows in any phase, some of them long enough for parts and blocks."""
    kv_heads = draw(st.integers(1, 6))
    tokens = draw(st.integers(1, draw(st.sampled_from([3, 12, 130]))))
    capacity = tokens + draw(st.integers(0, draw(st.sampled_from([4, 60, 900]))))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        new = draw(st.integers(0, tokens))
        rows.append((draw(st.one_of(st.just(0), st.integers(0, capacity - new))), new))
    return Case(
        f"fuzz{draw(st.integers(0, 99))}",
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.integers(1, kv_heads)),
        tuple(rows),
        head_dim=draw(st.integers(1, 40)),
        value_dim=draw(st.integers(1, 40)),
        tokens=tokens,
        capacity=capacity,
        probe_tokens=draw(st.integers(1, 9)),
        online=draw(st.booleans()),
        scale=draw(st.sampled_from([0.0, 0.2])),
        twins=draw(st.sampled_from([0, 1, 2])),
    )


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
