"""The table of `--explain`: what matched of each attention, or how far it got and which node stopped it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from chai_export.cli.main import main
from chai_export.clustering.clusters import Clusters
from chai_export.graph.rewrite import draft
from chai_export.graph.stage import explain
from tests.graph import test_mutations as mutations
from tests.helpers.onnx_fixtures import ALL, REFUSED, REWRITTEN, Fixture

MASK = {
    "A": "causal with padding, in the scores",
    "B": "causal with padding, in the scores",
    "C": "causal with padding, as input",
    "D": "causal with padding, as input",
    "E": "causal with padding, as input",
    "F": "causal with padding, in the scores",
    "G": "causal, inside the operator",
    "H": "causal, inside the operator",
    "I": "causal with padding, as input",
}
CACHE = {
    "E": "ScatterND",
    **dict.fromkeys("ABCDF", "Concat on axis 2"),
    **dict.fromkeys("GH", "inside the operator"),
}
ROPE = {
    **dict.fromkeys("ABDEF", "written out"),
    "G": "inside the operator",
    **dict.fromkeys("CK", "RotaryEmbedding"),
}


SCALE = {
    "J-genai-0.18.0-cpu-fp32-window": "0.25, window 16",
    "J-genai-0.18.0-cpu-fp32-softcap": "0.25, window 16, soft cap 50",
    "J-genai-0.18.0-cuda-fp16-sinks": "0.176777, window 16, sinks",
}


@pytest.mark.parametrize("fixture", REWRITTEN, ids=lambda fixture: fixture.name)
def test_every_part_of_a_match_is_named(fixture: Fixture) -> None:
    report = explain(fixture.path, Clusters(kept_heads=[2, 1][: fixture.layers]))
    assert report.columns == ["layer", "form", "heads", "R", "matched"]
    for layer, row in enumerate(report.to_json()["attentions"]):
        parts, form = row["parts"], row["form"]
        assert (row["layer"], row["R"]) == (layer, (2, 1)[layer])
        assert (
            row["heads"]
            == f"{fixture.query_heads} query, {fixture.kv_heads} KV, dim {fixture.config.get('head_dim', 16)}"
        )
        name = fixture.name
        assert parts["attention"].endswith(f", scale {SCALE.get(name, '0.25')}")
        assert parts["mask"] == MASK.get(form, MASK["G" if "tensorscatter" in name else "I"])
        assert parts["rope"] == ROPE.get(form, "com.microsoft.RotaryEmbedding")
        norm = {"F": "written out"}.get(form, "SimplifiedLayerNormalization")
        assert parts["norm"] == (norm if "qknorm" in name else "none")
        cache, how = parts["cache"].split(", ")
        assert cache == f"past_key_values.{layer}.key"
        other = "TensorScatter" if "tensorscatter" in name else "inside the operator"
        assert how == CACHE.get(form, "Concat on axis 2" if form == "I" and "gqa" in name else other)
        packed = form == "G" and "unfused" not in name
        weights = "MatMulNBits 4 bits" if fixture.quantised else "MatMul"
        assert parts["weights"] == weights + (" for Q, K and V in one" if packed else "")
        assert all(phrase in row["matched"] for phrase in parts.values())
        assert report.rows()[layer] == (str(layer), form, row["heads"], str(row["R"]), row["matched"])


@pytest.mark.parametrize("fixture", REFUSED, ids=lambda fixture: fixture.name)
def test_a_refusal_names_the_node_that_stopped_it(
    fixture: Fixture, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["inspect", str(fixture.path)])
    printed = capsys.readouterr()
    if fixture.name.startswith("broken"):
        assert (code, printed.out) == (1, "")
        assert printed.err.startswith("error: ")
        return
    assert code == 1
    assert fixture.record["refused"] in printed.out
    first = explain(fixture.path).to_json()["attentions"][0]
    assert first["matched_up_to"].endswith(", the operator itself")
    assert first["stopped_by"].split(":")[0] in first["matched_up_to"]
    assert [first["form"], first["parts"]] == ["", None]


MISSES: dict[str, tuple[Callable[[onnx.GraphProto], None], str, str]] = {
    "a limit": (mutations.clip_before_softmax, "the mask", "Softmax '"),
    "another cache axis": (mutations.cache_grows_along_heads, "the cache", "Concat '"),
    "rows swapped": (mutations.new_rows_before_old, "the cache", "Concat '"),
    "a bias": (mutations.bias_before_softmax, "the mask", "Softmax '"),
    "chunks": (mutations.chunks_of_8, "the mask", "Softmax '"),
}


@pytest.mark.parametrize("name", MISSES)
def test_the_furthest_point_that_was_reached(name: str, tmp_path: Path) -> None:
    mutation, reached, node = MISSES[name]
    report = explain(mutations.mutate(mutation, tmp_path), Clusters(kept_heads=[1, 1]))
    missed = next(row for row in report.to_json()["attentions"] if row["stopped_by"])
    assert missed["matched_up_to"].startswith("Softmax '")
    assert missed["matched_up_to"].endswith(f", {reached}")
    assert missed["stopped_by"].startswith(node)
    assert report.columns[-2:] == ["matched up to", "stopped by"]
    row = report.rows()[missed["layer"]]
    assert row[-2:] == (missed["matched_up_to"], missed["stopped_by"])
    assert row[3] == "1"


def test_the_printed_table_is_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "clusters.json"
    Clusters(kept_heads=[2, 1]).save(path)
    fixture = next(fixture for fixture in ALL if fixture.quantised)
    assert main(["rewrite", str(fixture.path), "--explain", "--clusters", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "form", "heads", "R", "matched"]
    for layer, kept in enumerate((2, 1)):
        for part in (f"{layer} ", " G ", f" {kept} ", "MatMulNBits 4 bits", f"past_key_values.{layer}.key"):
            assert part in lines[1 + layer]
    assert lines[3] == "can be rewritten: 2 attentions"
    assert lines[4].startswith("0.1 MB of weights; a rewrite takes up to ")


def test_what_else_stands_in_the_way_is_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = REWRITTEN[0]
    assert "3 layers" in explain(fixture.path, Clusters(kept_heads=[1, 1, 1])).verdict
    monkeypatch.setattr(draft, "MIN_OPSET", 99)
    report = explain(fixture.path)
    assert not report.rewritable
    assert "opset 99 or newer" in report.verdict
    assert [row[1] for row in report.rows()] == [fixture.name[0]] * 2
