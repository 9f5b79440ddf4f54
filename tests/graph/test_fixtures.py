"""Graphs of real producers, forms E to K: rewritten they compute what they computed, or they are refused."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from chai_export.bundle.graph_io import page_table
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.graph.stage import explain, rewrite
from chai_export.models.loading import load_model
from chai_export.models.oracle import Oracle
from chai_export.runtime.runner import load
from tests.helpers.onnx_fixtures import REFUSED, REWRITTEN, Fixture

each_rewritten = pytest.mark.parametrize("fixture", REWRITTEN, ids=lambda fixture: fixture.name)
GONE = {"Softmax", "Attention", "TensorScatter", "ScatterND"}
GONE |= {f"com.microsoft::{name}" for name in ("GroupQueryAttention", "MultiHeadAttention")}


@cache
def torch_model(path):
    return load_model(path)


@each_rewritten
def test_all_heads_kept_gives_the_source_logits_and_greedy_tokens(fixture: Fixture, rewritten) -> None:
    runner = load(rewritten(fixture, fixture.kv_heads).path, heads="all")
    reference = fixture.reference
    prompt, expected = reference["input_ids"].tolist(), reference["greedy"].tolist()
    logits = runner.logits(prompt)
    if not fixture.quantised:
        # int4 layers quantise activations too: one differing last bit can become one step of that grid.
        assert np.abs(logits - reference["logits"]).max() <= fixture.tolerance
    (generation,) = runner.generate([prompt], max_new_tokens=len(expected), ignore_eos=True)
    assert generation.token_ids == expected
    assert len(expected) == (64 if fixture.quantised else 32)


@pytest.mark.parametrize(
    "fixture", [f for f in REWRITTEN if not f.quantised], ids=lambda fixture: fixture.name
)
def test_fewer_heads_give_the_logits_of_the_torch_oracle(fixture: Fixture, rewritten) -> None:
    kept = fixture.kv_heads - 1
    runner = load(rewritten(fixture, kept).path)
    tokens = [*fixture.reference["input_ids"].tolist(), *fixture.reference["greedy"].tolist()]
    logits = runner.logits(tokens, chunks=[12, 20, len(tokens) - 32])
    oracle = Oracle(torch_model(fixture.model), [kept] * fixture.layers)
    expected = oracle.logits(tokens, runner.head_maps)
    # The oracle computes in float32, so a float16 bundle shows its own rounding here, the source's as well.
    allowed = 1e-4 if fixture.record["dtype"] == "float32" else 1e-2 * np.abs(expected).max()
    assert np.abs(logits - expected).max() <= allowed
    assert (runner.head_maps != np.arange(runner.head_maps.shape[2])).any(), "no head was shared"


@each_rewritten
def test_nothing_of_the_old_attention_is_left(fixture: Fixture, rewritten) -> None:
    from chai_export.graph.read.load import read_model

    bundle = rewritten(fixture, fixture.kv_heads)
    graph = read_model(bundle.model_path).graph
    ops = [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph]
    assert ops.count("chai::ClusteredHeadAttention") == fixture.layers
    assert not GONE & set(ops)
    assert {value.name for value in graph.inputs} == {
        *("input_ids", "lengths", "past_lengths", "output_positions", "head_map"),
        *(page_table(window) for window in bundle.manifest.cache_windows),
        *(["rope_lengths"] if "longrope" in fixture.name else []),
        *(f"past_{kind}.{layer}" for layer in range(fixture.layers) for kind in ("key", "value")),
    }
    if fixture.quantised:
        assert "com.microsoft::MatMulNBits" in ops


@each_rewritten
def test_explain_names_the_form_of_every_layer(fixture: Fixture) -> None:
    report = explain(fixture.path)
    form = fixture.name[0]
    # Query and key norms (J) stand before an attention of form G; form H has RoPE outside the operator.
    expected = {"J": {"G", "H"}}.get(form, {form})
    assert report.rewritable
    assert {row[1] for row in report.rows()} <= expected
    assert len(report.rows()) == fixture.layers


@each_rewritten
def test_tables_of_positions_limit_the_bundle(fixture: Fixture, rewritten) -> None:
    """genai and the handmade graphs hold cos and sin for 128 positions; the others compute them."""
    limit = rewritten(fixture, fixture.kv_heads).manifest.max_positions
    assert limit == (128 if fixture.name[0] in "GHIJK" else None)


@pytest.mark.parametrize("fixture", REFUSED, ids=lambda fixture: fixture.name)
def test_what_the_op_cannot_express_is_refused_by_name(fixture: Fixture, tmp_path) -> None:
    clusters = Clusters(kept_heads=[fixture.kv_heads] * fixture.layers)
    with pytest.raises(ChaiError) as caught:
        rewrite(fixture.path, clusters, tmp_path / "bundle")
    message = str(caught.value)
    assert fixture.record["refused"] in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
