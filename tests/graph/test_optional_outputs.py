"""What a node leaves out in the source it leaves out in the bundle; what a parser needs is written."""

from __future__ import annotations

import onnx
import pytest

from tests.helpers.onnx_fixtures import REWRITTEN, Fixture

GENAI = [fixture for fixture in REWRITTEN if "genai" in fixture.name]
each = pytest.mark.parametrize("fixture", GENAI, ids=lambda fixture: fixture.name)


def graph(path: str) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


@each
def test_outputs_without_a_name_stay_without(fixture: Fixture, rewritten) -> None:
    def omitted(nodes: onnx.GraphProto) -> list[list[bool]]:
        return [[bool(name) for name in n.output] for n in nodes.node if n.op_type.startswith("Skip")]

    before = omitted(graph(fixture.path / "model.onnx"))
    assert any(False in names for names in before)
    assert omitted(graph(rewritten(fixture, fixture.kv_heads).model_path)) == before


@each
def test_rotary_embeddings_of_merged_heads_say_how_many(fixture: Fixture, rewritten) -> None:
    bundle = rewritten(fixture, fixture.kv_heads)
    shape = bundle.manifest
    nodes = [node for node in graph(bundle.model_path).node if node.op_type == "RotaryEmbedding"]
    assert nodes
    stated = {a.i for node in nodes for a in node.attribute if a.name == "num_heads"}
    if fixture.name[0] in "HI":  # the file has them on [B,S,H·D]; form G has none, and gets [B,H,S,D]
        assert stated == {shape.num_query_heads, shape.num_kv_heads}
