"""Damaged ONNX bytes: the answer is a report or one line that says what is wrong, never a traceback."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chai_export.errors import ChaiError
from chai_export.graph.stage import explain
from tests.helpers.onnx_fixtures import ROOT

SOURCES = [
    (ROOT / "onnx" / name / "model.onnx").read_bytes()
    for name in ("G-genai-0.18.0-cpu-int4-gqa", "J-genai-0.18.0-cuda-fp16-paged")
]
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "truncate"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, damage: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, extra in damage:
        at = int(where * len(data))
        if kind == "flip":
            data = (
                data[:at]
                + bytes(b ^ x for b, x in zip(data[at : at + len(extra)], extra, strict=False))
                + data[at + len(extra) :]
            )
        elif kind == "cut":
            data = data[:at] + data[at + len(extra) :]
        elif kind == "insert":
            data = data[:at] + extra + data[at:]
        else:
            data = data[: max(1, at)]
    return data


def check(source: int, damage: list[tuple[str, float, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        path.write_bytes(damaged(SOURCES[source], damage))
        weights = ROOT / "onnx" / "G-genai-0.18.0-cpu-int4-gqa" / "model.onnx.data"
        path.with_name("model.onnx.data").write_bytes(weights.read_bytes())
        try:
            report = explain(path)
        except ChaiError as error:
            message = str(error)
        else:
            message = report.verdict
    if not message or "\n" in message:
        pytest.fail(repr(message))


@example(source=1, damage=[("flip", 0.5889285488146676, b"\x80")])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(source=st.integers(0, 1), damage=DAMAGE)
def test_damaged_bytes_give_one_line(source: int, damage: list[tuple[str, float, bytes]]) -> None:
    check(source, damage)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(source=st.integers(0, 1), damage=DAMAGE)
def test_damaged_bytes_give_one_line_at_length(source: int, damage: list[tuple[str, float, bytes]]) -> None:
    check(source, damage)
