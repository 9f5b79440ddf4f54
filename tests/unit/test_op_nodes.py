"""What a manifest says about the graph's op nodes is compared with the nodes before a session runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest

import chai_export as ce
from chai_export.bundle.bundle import MODEL_FILE, Bundle, finalise
from chai_export.bundle.manifest import Manifest
from chai_export.bundle.op_nodes import check_op_nodes
from chai_export.errors import ChaiError
from chai_export.op.schema import signature
from tests.helpers.tiny_graph import TinyModel

DATA = Path(__file__).parents[1] / "data"
TABLE = json.loads((DATA / "op_node_cases.json").read_text())
BASE = json.loads((DATA / "manifest_cases.json").read_text())["base"]
MAPS = {
    "parameters_saved": 1,
    "parameters_before": 2,
    "flops_saved_per_token": 1,
}


def edited(bundle: Bundle, name: str, value: int | None) -> Bundle:
    """The bundle with an attribute of its last op node changed, or taken away."""
    model = onnx.load(bundle.model_path)
    node = next(node for node in reversed(model.graph.node) if node.domain == "chai")
    attribute = next(attribute for attribute in node.attribute if attribute.name == name)
    if value is None:
        node.attribute.remove(attribute)
    else:
        attribute.i = value
    onnx.save(model, bundle.path / MODEL_FILE)
    finalise(bundle.path, bundle.manifest)
    return Bundle.load(bundle.path)


@pytest.mark.parametrize("model", [TinyModel(), TinyModel(probe=7), TinyModel(kept=(2, 2), sources=(0, 0))])
def test_a_graph_and_its_own_manifest_go_together(model, tmp_path):
    check_op_nodes(model.write(tmp_path / "b"))


@pytest.mark.parametrize("case", TABLE["cases"], ids=lambda case: case["name"])
def test_a_graph_is_taken_or_refused_as_the_table_says(case, tmp_path):
    """The table is the one that the C++ runner's check is tested with."""
    fields = BASE | TABLE["manifest"]
    nodes = [[each["op_type"], each["name"], each["key_cache"], dict(each["attributes"]), "chai"]
             for each in TABLE["nodes"]]  # fmt: skip
    version = TABLE["op_version"]
    for change in case["changes"]:
        if change.get("static"):
            fields["static"] = MAPS | {"head_maps": [list(range(8))] * 3}
        version = change.get("op_version", version)
        if "attribute" in change:
            nodes[change["node"]][3].pop(change["attribute"], None)
            if change["value"] is not None:
                nodes[change["node"]][3][change["attribute"]] = change["value"]
        elif "beside" in change:
            nodes.append([*nodes[change["node"]][:4], "other"])
        elif "removed" in change:
            del nodes[change["node"]]
        elif "key_cache" in change:
            nodes[change["node"]][2] = change["key_cache"] or ""
    onnx.save(graph_of(nodes, version), tmp_path / MODEL_FILE)
    bundle = Bundle(tmp_path, Manifest.model_validate(fields))
    if case["error"] is None:
        check_op_nodes(bundle)
        return
    with pytest.raises(ChaiError, match=rf"{re.escape(case['error'])}.*; export or rewrite again$"):
        check_op_nodes(bundle)


def graph_of(nodes: list[Any], version: int | None) -> onnx.ModelProto:
    made = []
    for op_type, name, cache, attributes, domain in nodes:
        place = signature(op_type).input_names.index("key_cache")
        inputs = ["x"] * place + [cache]
        made.append(onnx.helper.make_node(op_type, inputs, [name], name=name, domain=domain, **attributes))
    opsets = {"": 20, "chai": version}
    imports = [
        onnx.helper.make_opsetid(each, number) for each, number in opsets.items() if number is not None
    ]
    return onnx.helper.make_model(onnx.helper.make_graph(made, "main", [], []), opset_imports=imports)


def test_one_node_that_differs_is_enough(tmp_path):
    bundle = edited(TinyModel().write(tmp_path / "b"), "probe_tokens", 6)
    with pytest.raises(ChaiError, match=r"probe_tokens of node .* is 6 and should be 5"):
        ce.load(bundle.path)


def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path):
    bundle = TinyModel().write(tmp_path / "b")
    bundle.model_path.write_bytes(b"\xff" * 64)
    with pytest.raises(ChaiError, match=r"model\.onnx cannot be read"):
        check_op_nodes(bundle)
