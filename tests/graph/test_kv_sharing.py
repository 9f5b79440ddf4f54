"""Layers that read an earlier layer's K and V: calibrated, exported, rewritten and run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.op_nodes import check_op_nodes
from chai_export.cli.inspect import describe_bundle
from chai_export.cli.main import main
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.exporter.torch_export import export_onnx
from chai_export.graph.rewrite import replace
from chai_export.graph.stage import explain
from chai_export.models.kv_sources import kv_source_layers
from chai_export.models.loading import load_model
from chai_export.models.oracle import Oracle, model_logits
from chai_export.quality.method_comparison import compare
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, SWITCH, find_library
from chai_export.runtime.pages import PAGE_LENGTH
from tests.cla.modeling_cla import ClaConfig, ClaForCausalLM
from tests.helpers.contiguous_runner import ContiguousRunner
from tests.helpers.families import family_model
from tests.helpers.graph_runner import GraphRunner

SOURCES = [0, 0, 2, 2]
KEPT = (3, 3, 2, 2)
PROBE = 5
TOKENS = np.random.default_rng(3).integers(3, 96, 40).tolist()
PROMPTS = (TOKENS[:9], TOKENS[10:16], TOKENS[20:22])
TOLERANCE = 1e-4


def tiny_model(kv_sharing: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = ClaConfig(
        kv_sharing=kv_sharing, hidden_size=64, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=96, intermediate_size=96, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config.auto_map = {"AutoModelForCausalLM": "modeling_cla.ClaForCausalLM"}  # as saved and loaded again
    model = ClaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The model as a user has it: weights and the Python code that they need."""
    path = tmp_path_factory.mktemp("cla")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(directory) -> PreTrainedModel:
    return load_model(directory, trust_remote_code=True)


@pytest.fixture(scope="module")
def bundle(directory, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return ce.export(directory, Clusters(KEPT, probe_tokens=PROBE), out, trust_remote_code=True)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """Plain ONNX as another exporter writes it: opset 18, attention in many nodes."""
    return export_onnx(tiny_model(), tmp_path_factory.mktemp("decoder"), opset=18)


@pytest.fixture(params=["function body", "library"])
def implementation(request, monkeypatch) -> Iterator[str]:
    """With the library the producers run on it, and the layers that read them on whatever there is."""
    monkeypatch.setenv(SWITCH, "0" if request.param == "function body" else "1")
    if request.param == "library" and find_library(ONNXRUNTIME_LIBRARY) is None:
        pytest.skip("libchai_onnxruntime.so was not built")
    return str(request.param)


def test_which_layers_share_is_seen_in_what_they_read(model):
    assert kv_source_layers(model) == (0, 0, 2, 2)
    assert kv_source_layers(tiny_model(kv_sharing=4)) == (0, 0, 0, 0)
    assert kv_source_layers(tiny_model(kv_sharing=1)) is None
    assert kv_source_layers(family_model("llama-gqa")) is None


def test_the_graph_has_caches_for_producers_only(bundle):
    graph = onnx.load(bundle.model_path, load_external_data=False).graph
    caches = [value.name for value in graph.input if value.name.startswith("past_")][1:]
    assert caches == ["past_key.0", "past_value.0", "past_key.2", "past_value.2"]
    assert describe_bundle(bundle)["ops"]["chai::ClusteredHeadAttention"] == 2
    assert describe_bundle(bundle)["ops"]["chai::SharedClusteredHeadAttention"] == 2
    head_map = next(value for value in graph.input if value.name == "head_map")
    assert head_map.type.tensor_type.shape.dim[0].dim_value == 4
    assert bundle.manifest.kv_source_layers == SOURCES
    assert bundle.manifest.proof is not None
    assert "whole model" in bundle.manifest.proof.compared


def test_all_heads_equal_the_model(implementation, bundle, model):
    runner = ce.load(bundle.path, heads="all")
    np.testing.assert_allclose(runner.logits(TOKENS), model_logits(model, TOKENS), atol=TOLERANCE)
    assert (runner.head_maps == np.arange(8)).all()


def test_fewer_heads_equal_the_oracle(implementation, bundle, model):
    runner, oracle = ce.load(bundle.path), Oracle(model, KEPT, PROBE)
    for count in (1, 4, 5, 6, 40):
        logits = runner.logits(TOKENS[:count])
        np.testing.assert_allclose(logits, oracle.logits(TOKENS[:count]), atol=TOLERANCE)
        np.testing.assert_array_equal(runner.head_maps, oracle.head_maps)
    # On this random model sharing matters, and consumers choose maps of their own on the producer's heads.
    assert np.abs(logits - model_logits(model, TOKENS)).max() > 1e-2
    maps = runner.head_maps[:, 0]
    assert (maps[0] != maps[1]).any()
    assert (maps[2] != maps[3]).any()
    assert set(maps[0] // 2) == set(maps[1] // 2)
    np.testing.assert_allclose(runner.logits(TOKENS), oracle.logits(TOKENS, runner.head_maps), atol=TOLERANCE)


@pytest.mark.parametrize("chunks", [[5, 35], [9, 1, 1, 29], [5] + [1] * 35])
def test_chunks_make_no_difference(implementation, bundle, chunks):
    runner = ce.load(bundle.path)
    whole = runner.logits(TOKENS)
    np.testing.assert_allclose(runner.logits(TOKENS, chunks=chunks), whole, atol=TOLERANCE)


def test_greedy_tokens_are_the_oracles_alone_and_in_a_batch(implementation, bundle, model):
    runner = ce.load(bundle.path, max_batch=2)
    oracle = Oracle(model, KEPT, PROBE)
    results = runner.generate(PROMPTS, 6, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == oracle.greedy(prompt, 6)
    every = ce.load(bundle.path, heads="all").generate(PROMPTS[:1], 6, ignore_eos=True)
    wanted = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert every[0].token_ids == wanted[0, len(PROMPTS[0]) :].tolist()


def test_layers_share_pages_too(decoder, model, tmp_path):
    paged = ce.rewrite(decoder, Clusters(KEPT, probe_tokens=PROBE), tmp_path / "b", value_bits=8)
    assert paged.manifest.value_bits == [8] * 4
    assert "stored exactly" in paged.manifest.proof.compared
    check_op_nodes(paged)
    _compare_rows(paged, model, 0.1)


def test_rows_in_different_phases_do_not_touch_each_other(bundle, model):
    _compare_rows(bundle, model, TOLERANCE)


def _compare_rows(bundle, model, tolerance):
    runner = GraphRunner(bundle, batch=len(PROMPTS), capacity=16)
    texts = [list(prompt) for prompt in PROMPTS]
    steps = (texts, [[1, 2, 3], [4], []], [[10], [20], [30]])
    for step, chunk in enumerate(steps):
        logits = runner.step(chunk)
        for row, new in enumerate(chunk):
            texts[row] += new if step else []
            if new:
                expected = model_logits(model, texts[row])[-len(new) :]
                np.testing.assert_allclose(logits[row, : len(new)], expected, atol=tolerance)


def test_a_shared_cache_is_held_and_counted_once(bundle):
    runner = ce.load(bundle.path)
    runner.logits(TOKENS)
    # Two caches of 4 KV heads of 8 floats: 3 and 2 heads of keys, all heads of values.
    assert runner.kv_cache_bytes == PAGE_LENGTH * 4 * 8 * (3 + 4 + 2 + 4)
    assert runner.kv_cache_bytes_all_heads == PAGE_LENGTH * 4 * 8 * (4 * 4)
    everything = bundle.manifest.model_copy(update={"kv_source_layers": None})
    assert bundle.manifest.kv_bytes_per_token("all") * 2 == everything.kv_bytes_per_token("all")


def test_verify_finds_the_bundle_equal(bundle, directory):
    result = ce.verify(bundle.path, directory, new_tokens=8, trust_remote_code=True)
    assert result.ok
    assert result.head_map_agreement == 1.0


def test_verify_refuses_a_model_that_shares_otherwise(bundle):
    with pytest.raises(
        ChaiError, match=r"caches for layers \[0, 2\] and the reference model for \[0, 1, 2, 3\]"
    ):
        ce.verify(bundle.path, tiny_model(kv_sharing=1))


@pytest.mark.parametrize("options", [{"keep": "elbow"}, {"keep": "budget:0.2", "measure": "kl"}])
def test_calibrate_gives_one_number_per_cache(directory, options):
    text = np.random.default_rng(0).integers(3, 96, 2000).tolist()
    clusters = ce.calibrate(directory, [text], samples=4, seq_len=32, trust_remote_code=True, **options)
    kept = clusters.kept_heads
    assert (kept[0], kept[2]) == (kept[1], kept[3])
    assert clusters.kv_bytes_saved == pytest.approx(sum(4 - kept[i] for i in (0, 2)) / 16)
    if "measure" in options:
        assert clusters.kl_curves[0] == clusters.kl_curves[1]
        assert clusters.kl_curves[0] != clusters.kl_curves[2]
        assert clusters.kv_bytes_saved >= 0.2


def test_plain_onnx_is_rewritten(decoder, tmp_path, model):
    rewritten = ce.rewrite(decoder, Clusters(KEPT), tmp_path / "bundle", probe_tokens=PROBE)
    assert rewritten.manifest.kv_source_layers == SOURCES
    oracle = Oracle(model, KEPT, PROBE)
    np.testing.assert_allclose(ce.load(rewritten.path).logits(TOKENS), oracle.logits(TOKENS), atol=TOLERANCE)
    every = ce.load(rewritten.path, heads="all").logits(TOKENS)
    np.testing.assert_allclose(every, model_logits(model, TOKENS), atol=TOLERANCE)


def test_explain_and_inspect_name_the_cache_that_is_read(decoder, bundle, capsys):
    matched = [row["matched"] for row in explain(decoder).to_json()["attentions"]]
    assert [text.endswith("reads the cache of layer 0") for text in matched] == [False, True, False, False]
    assert [text.endswith("reads the cache of layer 2") for text in matched] == [False, False, False, True]
    assert main(["inspect", str(bundle.path)]) == 0
    assert "layer 1 reads layer 0, layer 3 reads layer 2" in capsys.readouterr().out


def test_unequal_numbers_for_one_cache_are_refused(decoder, tmp_path, model):
    message = "layer 3 keeps 1 KV heads and reads the cache of layer 2, which keeps 2; they must be equal"
    with pytest.raises(ChaiError, match=message):
        ce.rewrite(decoder, Clusters((3, 3, 2, 1)), tmp_path / "bundle")
    with pytest.raises(ChaiError, match=message):
        ce.export(model, Clusters((3, 3, 2, 1)), tmp_path / "bundle")
    with pytest.raises(ChaiError, match=message):
        Oracle(model, (3, 3, 2, 1))
    assert not (tmp_path / "bundle").exists()


def test_keys_of_one_layer_and_values_of_another_are_refused(decoder, tmp_path):
    graph = onnx.load(decoder)
    present = {value.name: value for value in graph.graph.output}
    assert "present.2.value" in present
    softmaxes = [node for node in graph.graph.node if node.op_type == "Softmax"]
    after = [
        next(node for node in graph.graph.node if node.op_type == "MatMul" and name in node.input)
        for name in (_through_guards(graph.graph, node.output[0]) for node in softmaxes)
    ]
    after[3].input[1] = after[0].input[1]
    onnx.save(graph, tmp_path / "mixed.onnx")
    with pytest.raises(ChaiError, match=r"layer 3.*cache of layer 2, but not that layer's keys and values"):
        ce.rewrite(tmp_path / "mixed.onnx", Clusters(KEPT), tmp_path / "bundle")


def _through_guards(graph: Any, name: str) -> str:
    """The name under which a MatMul reads a softmax, past the nodes that guard it against NaN."""
    while True:
        readers = [node for node in graph.node if name in node.input]
        if any(node.op_type == "MatMul" for node in readers):
            return name
        name = next(node for node in readers if node.op_type == "Where").output[0]


def test_a_layer_connected_to_the_wrong_cache_is_never_written(decoder, tmp_path, monkeypatch):
    real = replace._shared

    def wrong(builder: Any, site: Any, new: Any, producer: Any, *rest: Any) -> Any:
        first = next(node for node in builder.graph if node.op_type == "ClusteredHeadAttention")
        return real(builder, site, new, first, *rest)

    monkeypatch.setattr(replace, "_shared", wrong)
    with pytest.raises(ChaiError, match="differs from the source: the logits"):
        ce.rewrite(decoder, Clusters(KEPT), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_does_not_know_shared_caches_says_so(bundle, model, tmp_path):
    with pytest.raises(ChaiError, match="SharedClusteredHeadAttention has no TensorRT plugin"):
        ce.build(bundle.path, "tensorrt")
    with pytest.raises(ChaiError, match="static membership is not supported"):
        ce.export(model, Clusters(KEPT), tmp_path / "static", membership="static", text=[TOKENS])
    with pytest.raises(ChaiError, match="read another layer's KV cache"):
        compare(model, [TOKENS])


def test_build_for_onnxruntime(implementation, bundle):
    assert ce.build(bundle.path, max_batch=2, max_seq=64).backend == "onnxruntime"


def test_a_plan_gives_layers_of_one_cache_one_choice_and_counts_its_bytes_once(directory, tmp_path):
    text = np.random.default_rng(0).integers(3, 96, 2000).tolist()
    plan = ce.calibrate(
        directory, [text], bytes_share=0.5, samples=3, seq_len=32, probe_tokens=PROBE, trust_remote_code=True
    )
    assert (plan.layers[0], plan.layers[2]) == (plan.layers[1], plan.layers[3])
    assert len(plan.measured.damage) == 2
    exported = ce.export(directory, plan, tmp_path / "bundle", trust_remote_code=True).manifest
    assert exported.kv_bytes_per_token() / exported.kv_bytes_per_token_float16 == pytest.approx(
        plan.kv_bytes_share
    )
    assert plan.kv_bytes_share <= 0.5


def test_the_ops_in_plain_onnx_give_the_same_maps_and_logits(bundle):
    runners = [kind(bundle, 2, 16, "chai") for kind in (GraphRunner, ContiguousRunner)]
    for rows in ([[5, 11, 7, 40, 3, 3, 21], [17, 2, 40]], [[10], []], [[11], [21, 9]]):
        wanted, got = (runner.step(rows) for runner in runners)
        np.testing.assert_array_equal(runners[1].head_map, runners[0].head_map)
        for row, new in enumerate(rows):
            np.testing.assert_allclose(got[row, : len(new)], wanted[row, : len(new)], atol=TOLERANCE)
