"""Damaged ONNX bytes on the command line: one `error:` line and an exit code, no traceback, no bundle."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chai_export.cli.main import main

FIXTURES = Path(__file__).parents[1] / "fixtures" / "onnx"
SOURCE = FIXTURES / "G-genai-0.18.0-cpu-int4-gqa"
GRAPH, WEIGHTS = (SOURCE / "model.onnx").read_bytes(), (SOURCE / "model.onnx.data").read_bytes()
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)
CUTS = st.floats(0, 0.99)


def edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes flipped, cut out or inserted at shares of the file's length."""
    for kind, where, extra in edits:
        at, width = int(where * len(data)), len(extra)
        if kind == "flip":
            middle = bytes(a ^ b for a, b in zip(data[at : at + width], extra, strict=False))
            data = data[:at] + middle + data[at + width :]
        else:
            data = (
                data[:at]
                + (extra if kind == "insert" else b"")
                + data[at + (0 if kind == "insert" else width) :]
            )
    return data


@contextlib.contextmanager
def folder(graph: bytes, weights: bytes = WEIGHTS) -> Iterator[Path]:
    """A directory with model.onnx, its weights and a clusters.json that fits them."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "model.onnx").write_bytes(graph)
        (directory / "model.onnx.data").write_bytes(weights)
        (directory / "clusters.json").write_text(
            json.dumps({"format": "chai-clusters/1", "kept_heads": [2, 2]})
        )
        yield directory


def arguments(directory: Path) -> list[str]:
    model, clusters = str(directory / "model.onnx"), str(directory / "clusters.json")
    return ["rewrite", model, "--clusters", clusters, "-o", str(directory / "bundle")]


def check(directory: Path, code: int, out: str, err: str) -> bool:
    """Whether the rewrite was refused; what it said and left behind is checked in either case."""
    assert "Traceback" not in out + err, err
    left = {entry.name for entry in directory.iterdir()} - {"model.onnx", "model.onnx.data", "clusters.json"}
    if code == 0:  # the damage hit what is not used: names, documentation, weights
        assert left == {"bundle"}
        assert "error:" not in err
        return False
    assert code in (1, 2)
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    assert "unexpected" not in lines[0], err
    assert out == ""
    assert left == set()
    return True


def rewrite_in_process(directory: Path) -> bool:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments(directory))
    return check(directory, code, out.getvalue(), err.getvalue())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(edits=EDITS)
def test_damaged_graphs(edits: list[tuple[str, float, bytes]]) -> None:
    with folder(edited(GRAPH, edits)) as directory:
        rewrite_in_process(directory)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example(where=0.0)
@given(where=CUTS)
def test_a_graph_that_ends_early_is_always_refused(where: float) -> None:
    with folder(GRAPH[: int(where * len(GRAPH))]) as directory:
        assert rewrite_in_process(directory)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(where=CUTS)
def test_weights_that_end_early_are_always_refused(where: float) -> None:
    with folder(GRAPH, WEIGHTS[: int(where * len(WEIGHTS))]) as directory:
        assert rewrite_in_process(directory)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=EDITS)
def test_damaged_graphs_at_length(edits: list[tuple[str, float, bytes]]) -> None:
    with folder(edited(GRAPH, edits)) as directory:
        rewrite_in_process(directory)


@pytest.mark.parametrize(
    "graph",
    [b"", GRAPH[: len(GRAPH) // 2], edited(GRAPH, [("flip", 0.3, b"\xff" * 6)])],
    ids=["empty", "half", "flipped"],
)
def test_damage_in_a_process_of_its_own(graph: bytes) -> None:
    """What C++ libraries print past Python's streams would show here."""
    with folder(graph) as directory:
        command = [sys.executable, "-m", "chai_export.cli.main", *arguments(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert check(directory, done.returncode, done.stdout, done.stderr)


def test_nothing_damaged_is_rewritten() -> None:
    with folder(GRAPH) as directory:
        assert not rewrite_in_process(directory)
