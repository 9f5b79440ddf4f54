"""What a manifest says about the graph's op nodes is compared with the nodes before a session runs them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import chai_export as ce
from chai_export.bundle.bundle import MODEL_FILE, Bundle, finalise
from chai_export.bundle.op_nodes import check_op_nodes
from chai_export.errors import ChaiError
from tests.helpers.tiny_graph import TinyModel

MAPS = {
    "head_maps": [[0, 0, 2, 2]] * 2,
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe_tokens": 7}, "probe_tokens of node .* is 5 and should be 7"),
        ({"static": MAPS}, "online of node .* is 1 and should be 0"),
        (
            {"kept_heads": [2, 2], "kv_source_layers": [0, 0]},
            "2 ClusteredHeadAttention nodes and should have 1",
        ),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(change, message, tmp_path):
    with pytest.raises(
        ChaiError, match=rf"does not fit its manifest: .*{message}.*; export or rewrite again$"
    ):
        check_op_nodes(TinyModel().write(tmp_path / "b", **change))


def test_one_node_that_differs_is_enough(tmp_path):
    bundle = edited(TinyModel().write(tmp_path / "b"), "probe_tokens", 6)
    with pytest.raises(ChaiError, match=r"probe_tokens of node .* is 6 and should be 5"):
        ce.load(bundle.path)


@pytest.mark.parametrize(("probe", "fits"), [(5, True), (6, False)])
def test_an_attribute_that_is_not_written_has_its_default(probe, fits, tmp_path):
    bundle = edited(TinyModel(probe=probe).write(tmp_path / "b"), "probe_tokens", None)
    if fits:
        check_op_nodes(bundle)
    else:
        with pytest.raises(ChaiError, match="is 5 and should be 6"):
            check_op_nodes(bundle)


def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path):
    bundle = TinyModel().write(tmp_path / "b")
    bundle.model_path.write_bytes(b"\xff" * 64)
    with pytest.raises(ChaiError, match=r"model\.onnx cannot be read"):
        check_op_nodes(bundle)
