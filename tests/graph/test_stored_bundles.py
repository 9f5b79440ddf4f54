"""Bundles with caches stored as asked, proven with exact storage."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.op_nodes import check_op_nodes
from chai_export.cli.inspect import describe_bundle, print_bundle
from chai_export.cli.main import main
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError, UsageError
from chai_export.models.oracle import model_logits
from chai_export.op.heads import HeadCounts
from chai_export.op.precision import Precision
from tests.helpers.exported import exported, model_of
from tests.helpers.families import family_model
from tests.helpers.graph_runner import GraphRunner
from tests.helpers.tiny_graph import TinyModel

NAME = "llama-gqa"  # 8 query heads, 2 KV heads of 8
TOKENS = np.random.default_rng(3).integers(3, 96, 30).tolist()
PROMPTS = (TOKENS[:9], TOKENS[10:16], TOKENS[20:22])
EXACT = 1e-4


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    made: dict[tuple[int, int], Bundle] = {}

    def make(key_bits: int, value_bits: int) -> Bundle:
        bits = key_bits, value_bits
        if bits not in made:
            out = tmp_path_factory.mktemp("stored") / "bundle"
            clusters = Clusters((2, 1))
            made[bits] = ce.rewrite(exported(NAME), clusters, out, key_bits=key_bits, value_bits=value_bits)
        return made[bits]

    return make


def logits_of(bundle: Bundle, heads: str = "all") -> list[np.ndarray]:
    """Of three rows, fed as prompts of different lengths and then token by token."""
    runner = GraphRunner(bundle, len(PROMPTS), 16, heads)
    found = [[rows] for rows in runner.step(PROMPTS)]
    found = [[logits[0][: len(prompt)]] for logits, prompt in zip(found, PROMPTS, strict=True)]
    for step in range(3):
        for row, logits in enumerate(runner.step([[TOKENS[25 + step]]] * len(PROMPTS))):
            found[row].append(logits[:1])
    return [np.concatenate(row) for row in found]


def truth() -> list[np.ndarray]:
    model = model_of(NAME)
    return [model_logits(model, [*prompt, *TOKENS[25:28]]) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("bits", "tolerance"), [((0, 0), EXACT), ((16, 16), 0.02), ((8, 8), 0.2), ((8, 4), 2.0)]
)
def test_the_logits_are_the_models_as_far_as_the_storage_allows(bits, tolerance, bundles):
    worst = max(np.abs(a - b).max() for a, b in zip(logits_of(bundles(*bits)), truth(), strict=True))
    assert worst <= tolerance
    if bits != (0, 0):
        assert worst > EXACT / 10


def test_the_manifest_says_what_is_stored_and_how_it_was_proven(bundles):
    manifest = bundles(8, 4).manifest
    assert (manifest.op_version, manifest.group) == (2, 8)
    assert (manifest.key_bits, manifest.value_bits) == ([8, 8], [4, 4])
    assert "caches stored exactly" in manifest.proof.compared
    assert manifest.proof.max_abs_diff <= manifest.proof.tolerance
    assert "stored exactly" not in bundles(0, 0).manifest.proof.compared


def test_nodes_carry_all_attributes_and_the_one_body_that_they_use(bundles):
    model = onnx.load(bundles(8, 4).model_path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == "chai"]
    assert {node.overload for node in nodes} == {"k8v4"}
    assert [(each.name, each.overload) for each in model.functions] == [("ClusteredHeadAttention", "k8v4")]
    for node in nodes:
        stated = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert {name: stated[name] for name in ("key_bits", "value_bits", "group", "window", "softcap")} == {
            "key_bits": 8, "value_bits": 4, "group": 8, "window": 0, "softcap": 0.0,
        }  # fmt: skip
        assert "page_table" in node.input


@pytest.mark.parametrize("bits", [(0, 0), (8, 4)])
def test_nodes_and_manifest_go_together(bits, bundles):
    check_op_nodes(bundles(*bits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_bits": [8, 4]}, "key_bits of node .* is 8 and should be 4"),
        ({"value_bits": [8, 4]}, "value_bits of node .* is 4 and should be 8"),
        ({"group": 2}, "group of node .* is 4 and should be 2"),
    ],
)
def test_a_manifest_of_another_storage_is_refused(change, message, tmp_path):
    with pytest.raises(ChaiError, match=message):
        check_op_nodes(TinyModel(bits=(8, 4)).write(tmp_path / "b", **change))


@pytest.mark.parametrize("bits", [(3, None), (None, 2), (True, None), ("8", None)])
def test_bits_that_there_are_not_are_refused_before_any_work(bits, tmp_path):
    with pytest.raises(UsageError, match="give 16, 8 or 4"):
        ce.rewrite(
            tmp_path / "absent.onnx", Clusters((2,)), tmp_path / "b", key_bits=bits[0], value_bits=bits[1]
        )


def test_the_command_takes_the_bits(tmp_path, capsys):
    Clusters((2, 1)).save(tmp_path / "clusters.json")
    options = ["--clusters", str(tmp_path / "clusters.json"), "-o", str(tmp_path / "b"), "--key-bits", "4"]
    assert main(["rewrite", str(exported(NAME)), *options, "--json"]) == 0
    manifest = Bundle.load(tmp_path / "b").manifest
    assert (manifest.key_bits, manifest.value_bits) == ([4, 4], [8, 8])  # 8 bits unless something is said


def test_a_half_precision_model_has_its_caches_stored_alike(tmp_path):
    half = ce.export(model_of(NAME), Clusters((2, 1)), tmp_path / "b", dtype="float16", key_bits=8)
    caches = {cache.past.name: cache.past.dtype for cache in half.manifest.io.caches}
    assert (caches["past_key.0"], caches["past_value.0"]) == ("int8", "float16")
    check_op_nodes(half)
    ids = TOKENS[:12]
    found = ce.load(half.path, heads="all").logits(ids)
    assert np.abs(found - model_logits(model_of(NAME), ids)).max() < 0.2


def test_static_maps_and_fewer_bits_go_together(tmp_path):
    model, text = family_model("llama-mha"), np.random.default_rng(0).integers(3, 96, 3000).tolist()
    options = {"membership": "static", "text": [text]}
    plain = ce.export(model, Clusters((4, 4)), tmp_path / "plain", **options)
    stored = ce.export(model, Clusters((4, 4)), tmp_path / "stored", value_bits=16, **options)
    check_op_nodes(stored)
    assert stored.manifest.static == plain.manifest.static
    found, wanted = (ce.load(bundle.path).logits(TOKENS) for bundle in (stored, plain))
    np.testing.assert_allclose(found, wanted, atol=0.02)


@pytest.mark.parametrize(
    ("precision", "widths", "group"),
    [
        (Precision(8, 4), (128, 64), 32),
        (Precision(8, 8), (80, 80), 16),
        (Precision(8, 4), (64, 40), 8),
        (Precision(16, 4), (7, 64), 32),
        (Precision(0, 16), (7, 5), 32),
    ],
)
def test_the_largest_group_that_divides_is_taken(precision, widths, group):
    assert precision.group(HeadCounts(4, 2, *widths)) == group


def test_rows_that_no_group_divides_are_refused_with_what_helps():
    with pytest.raises(ChaiError, match=r"values of 30 elements cannot be stored in 4 bits.*--value-bits 16"):
        Precision(8, 4).group(HeadCounts(4, 2, 64, 30))


def test_inspect_says_what_is_stored_and_what_it_takes(bundles, capsys):
    facts = describe_bundle(bundles(8, 4))
    assert (facts["op_version"], facts["key_bits"], facts["value_bits"], facts["group"]) == (
        2,
        [8, 8],
        [4, 4],
        8,
    )
    parts = facts["kv_bytes_by_part"]
    # 2 and 1 of 2 KV heads in K; rows of 8 elements, one scale (4 bits: and a minimum) of 2 bytes each.
    assert parts == {"keys": 3 * 8, "values": 4 * 4, "scales": 3 * 2 + 4 * 4}
    assert facts["kv_bytes_per_token"] == sum(parts.values())
    assert facts["kv_bytes_per_token_float16"] == 2 * 2 * 2 * (8 + 8)
    print_bundle(bundles(8, 4), as_json=False)
    printed = capsys.readouterr().out
    assert "keys in 8 bits, values in 4 bits, 8 elements to a scale" in printed
    print_bundle(bundles(0, 16), as_json=False)
    printed = capsys.readouterr().out
    assert "keys in float32, values in float16 " in printed
    assert "to a scale" not in printed
    plain = describe_bundle(TinyModel().write(bundles(8, 4).path.parent / "plain"))
    assert (plain["key_bits"], plain["group"]) == ([0, 0], None)
