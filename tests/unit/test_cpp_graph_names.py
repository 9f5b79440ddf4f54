"""The names of a graph's inputs and outputs that the C++ runner writes out are those of the contract."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chai_export.bundle import graph_io

ROOT = Path(__file__).parents[2]
BACKENDS = {
    "onnxruntime": re.compile(r'(?:BindInput|BindOutput|expect\((?:inputs|outputs),)\s*\(?"([a-z_.]+)"'),
    "tensorrt": re.compile(r'(?:lay\((?:fed|made),|getTensor\w+\()\s*"([a-z_.]+)"'),
}
WHOLE = {
    graph_io.INPUT_IDS, graph_io.LENGTHS, graph_io.PAST_LENGTHS, graph_io.OUTPUT_POSITIONS,
    graph_io.HEAD_MAP, graph_io.LOGITS, graph_io.PRESENT_HEAD_MAP,
}  # fmt: skip
"""All that the C++ runner feeds and reads but page tables and caches; it refuses rope_lengths."""
PREFIXES = {
    each.split("key")[0] for each in (graph_io.past_key(0), graph_io.present_key(0))
}  # of caches, which C++ puts together


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_are_those_of_the_graph(backend: str) -> None:
    sources = sorted((ROOT / "plugins" / "runner" / "backends" / backend).glob("*.cpp"))
    found = {name for file in sources for name in BACKENDS[backend].findall(file.read_text(encoding="utf-8"))}
    assert found - PREFIXES == WHOLE


def test_page_tables_are_named_in_one_place() -> None:
    """One for each window, so that their names are put together."""
    source = (ROOT / "plugins" / "runner" / "geometry.h").read_text(encoding="utf-8")
    whole, prefix = re.search(r'window == 0 \? "([a-z_.]+)" : "([a-z_.]+)" \+', source).groups()  # type: ignore[union-attr]
    assert whole == graph_io.page_table(0) == graph_io.PAGE_TABLE
    assert f"{prefix}24" == graph_io.page_table(24)
    tensorrt = ROOT / "plugins" / "runner" / "backends" / "tensorrt" / "session.cpp"
    assert f'rfind("{graph_io.PAGE_TABLE}", 0)' in tensorrt.read_text(encoding="utf-8")
