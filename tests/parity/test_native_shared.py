"""The native library on the cases of SharedClusteredHeadAttention, on bad inputs and on random calls."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chai_export.op.cases import Case
from chai_export.op.schema import SHARED_OP_TYPE
from chai_export.op.shared_cases import SHARED_CASES, SHARED_TERM_CASES, SharedCase, check_shared
from chai_export.op.shared_reference import SharedAttentionResult
from tests.parity.test_native import DTYPES, LIBRARY, calls, instruction_sets, session

EVERY = (*SHARED_CASES, *SHARED_TERM_CASES)

pytestmark = pytest.mark.skipif(
    LIBRARY is None and "CI" not in os.environ,
    reason="libchai_onnxruntime.so was not built; reinstall where a C++ compiler is",
)


def run(case: SharedCase, inputs: dict[str, np.ndarray], dtype: str = "float32", threads: int = 1):
    """The op by the library alone; its inputs must come out unchanged."""
    arrays = {name: array.copy() for name, array in inputs.items()}
    of_types = session(case.producer, dtype, op_type=SHARED_OP_TYPE, threads=threads)
    outputs = of_types.bind(arrays, in_place=False).run()
    for name, array in inputs.items():
        assert array.tobytes() == arrays[name].tobytes(), name
    return SharedAttentionResult(**outputs)


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_library_agrees_with_reference(case, dtype):
    inputs = case.inputs(dtype)
    check_shared(case, inputs, run(case, inputs, dtype, threads=2), dtype)


def test_every_instruction_set_passes_the_suite(monkeypatch):
    for name in instruction_sets():
        monkeypatch.setenv("CHAI_ISA", name)
        for case in EVERY:
            inputs = case.inputs()
            check_shared(case, inputs, run(case, inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [8, 1]}, "row 0: lengths is 8, must be between 0 and 7"),
        ({"past_lengths": [0, 24]}, "row 1: 24 cached and 1 new tokens exceed the capacity 24"),
        ({"page_table": [[9, 0, 0], [1, 2, 3]]}, "row 0: page_table entry 0 is 9, the pool has 9 pages"),
        (
            {"kept_head_map": [[0] * 4, [0, 1, 2, 2]]},
            "row 1: the head map keeps 3 KV heads, the K cache has 2",
        ),
        ({"kept_head_map": [[0, 0, 4, 0], [0] * 4]}, "row 0: head map entry 2 is 4, must be between 0 and 3"),
        ({"past_head_map": [[0] * 4, [0, 0, -1, 0]]}, "row 1: head map entry 2 is -1"),
        (
            {"kept_head_map": [[0] * 4, [1] * 4], "past_head_map": [[0] * 4, [1, 1, 3, 1]]},
            "row 1: the head map names KV head 3, which the producer did not keep",
        ),
    ],
)
def test_bad_rows_are_refused(change, message):
    case = SharedCase(Case("bad_rows", 4, 4, 2, ((0, 7), (9, 1))))
    inputs = case.inputs()
    inputs.update({name: np.array(value, dtype=np.int32) for name, value in change.items()})
    with pytest.raises(Exception, match=f"chai::SharedClusteredHeadAttention: {message}"):
        run(case, inputs)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("key_cache", (9, 2, 7, 16), r"value_cache is \[9, 4, 8, 16\], expected \[9, 4, 7, 16\]"),
        ("value_cache", (9, 3, 8, 16), r"value_cache is \[9, 3, 8, 16\]"),
        ("kept_head_map", (2, 3), r"kept_head_map is \[2, 3\], expected \[2, 4\]"),
    ],
)
def test_bad_shapes_are_refused(name, shape, message):
    case = SharedCase(Case("bad_shape", 4, 4, 2, ((0, 7), (9, 1))))
    inputs = case.inputs()
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    with pytest.raises(Exception, match=message):
        run(case, inputs)


@settings(
    max_examples=int(os.environ.get("CHAI_FUZZ_EXAMPLES", "60")),
    deadline=None,
    derandomize="CHAI_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(calls(), st.sampled_from(DTYPES), st.sampled_from([1, 2]))
def test_random_calls_agree_with_reference(producer, dtype, threads):
    case = SharedCase(producer)
    inputs = case.inputs(dtype)
    check_shared(case, inputs, run(case, inputs, dtype, threads=threads), dtype)
