"""The names of a graph's inputs and outputs in C++ are those of the contract, and nowhere written out."""

from __future__ import annotations

import re
from pathlib import Path

from chai_export.bundle import graph_io
from chai_export.bundle.cpp_names import header

RUNNER = Path(__file__).parents[2] / "plugins" / "runner"
HEADER = RUNNER / "graph_names.h"


def test_the_header_is_made_of_the_contract():
    assert HEADER.read_text(encoding="utf-8") == header(), (
        "run `python -m chai_export.bundle.cpp_names > plugins/runner/graph_names.h`"
    )
    names = dict(re.findall(r'inline constexpr char (k\w+)\[\] = "([a-z_]+)";', header()))
    for layer in (0, 3):
        assert f"{names['kPastKey']}.{layer}" == graph_io.past_key(layer)
        assert f"{names['kPastValue']}.{layer}" == graph_io.past_value(layer)
        for kind, of in (("key", graph_io.present_key), ("value", graph_io.present_value)):
            assert f"{names['kPresent']}{kind}.{layer}" == of(layer)
    assert names["kPast"] == graph_io.past_key(0)[: -len("key.0")]
    assert f"{names['kPageTable']}.24" == graph_io.page_table(24)
    assert names["kPageTable"] == graph_io.page_table(0)


def test_no_name_is_written_out_in_the_runner():
    names = {
        graph_io.INPUT_IDS, graph_io.LENGTHS, graph_io.PAST_LENGTHS, graph_io.OUTPUT_POSITIONS,
        graph_io.PAGE_TABLE, graph_io.HEAD_MAP, graph_io.LOGITS, graph_io.PRESENT_HEAD_MAP,
    }  # fmt: skip
    sources = {*RUNNER.rglob("*.cpp"), *RUNNER.rglob("*.h")} - {HEADER, RUNNER / "manifest_schema.h"}
    assert len(sources) > 20
    for file in sorted(sources):
        literals = set(re.findall(r'"([a-z_.]+)"', file.read_text(encoding="utf-8")))
        wrong = literals & names | {text for text in literals if re.match(r"(past|present)_", text)}
        assert not wrong, file
