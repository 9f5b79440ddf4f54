"""Windows, soft caps and sinks: what a source graph has is what its bundle has, and nothing else passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from chai_export.errors import ChaiError
from chai_export.graph.match.site import ScoreTerms
from chai_export.graph.prove.attentions import SiteProver
from chai_export.graph.prove.survey import survey
from chai_export.graph.read.load import load_graph
from chai_export.models.oracle import Oracle, model_logits
from tests.helpers.exported import bundle_of, exported, kept_of, model_of
from tests.helpers.families import FAMILIES
from tests.helpers.graph_runner import GraphRunner

WINDOW = 6
TERMS = [name for name in FAMILIES if name.endswith("-window") or name in ("gemma2", "gpt_oss")]
IN_CI = {"gemma2", "gpt_oss", "gemma3-window", "mistral-window"}
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_CI else [pytest.mark.slow]) for name in TERMS]
)
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)


def texts(count: int, *lengths: int) -> list[list[int]]:
    return [np.random.default_rng(seed).integers(3, 96, n).tolist() for seed, n in enumerate(lengths * count)]


@each
def test_a_mixed_batch_gives_the_models_logits_around_the_window(name: str) -> None:
    """At once, in chunks and token by token; rows end below, at and past the window."""
    prompts = texts(1, *LENGTHS)
    expected = [model_logits(model_of(name), prompt) for prompt in prompts]
    for cut in (3 * WINDOW, 4, 1):
        runner = GraphRunner(bundle_of(name), batch=len(prompts), capacity=3 * WINDOW)
        made: list[list[np.ndarray]] = [[] for _ in prompts]
        for start in range(0, 3 * WINDOW, cut):
            rows = [prompt[start : start + cut] for prompt in prompts]
            logits = runner.step(rows)
            for row, new in enumerate(rows):
                made[row].append(logits[row, : len(new)])
        for row, logits in enumerate(expected):
            np.testing.assert_allclose(np.concatenate(made[row]), logits, atol=1e-4)


@each
def test_fewer_heads_give_the_oracles_logits_and_maps_past_the_window(name: str) -> None:
    (tokens,) = texts(1, 4 * WINDOW)
    runner = GraphRunner(bundle_of(name), batch=1, capacity=4 * WINDOW, heads="chai")
    got = [runner.step([tokens[:8]])[0], *(runner.step([tokens[i : i + 3]])[0] for i in range(8, 23, 3))]
    got.append(runner.step([tokens[23:]])[0])
    oracle = Oracle(model_of(name), kept_of(name))
    expected = oracle.logits(tokens)
    np.testing.assert_array_equal(runner.head_map, oracle.head_maps)
    np.testing.assert_allclose(np.concatenate(got), expected, atol=1e-4)


@each
def test_the_manifest_and_the_nodes_say_what_each_layer_has(name: str) -> None:
    config = model_of(name).config
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    manifest = bundle_of(name).manifest
    assert manifest.windows == [WINDOW if kind == "sliding_attention" else 0 for kind in kinds]
    nodes = [n for n in onnx.load(bundle_of(name).model_path).graph.node if n.domain == "chai"]
    assert len(nodes) == len(kinds)
    for layer, node in enumerate(nodes):
        stated = {attribute.name: attribute.f or attribute.i for attribute in node.attribute}
        assert stated["window"] == manifest.window(layer)
        assert stated["softcap"] == (2.0 if name == "gemma2" else 0)
        assert (f"sinks.{layer}" in node.input) is (name == "gpt_oss")


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "window too short": ("mistral-window", {"window": WINDOW - 1}),
    "window too long": ("mistral-window", {"window": WINDOW + 1}),
    "no window": ("mistral-window", {"window": 0}),
    "no cap": ("gemma2", {"softcap": 0.0}),
    "another cap": ("gemma2", {"softcap": 2.01}),
    "no sinks": ("gpt_oss", {"sinks": None}),
    "one sink": ("gpt_oss", {"sinks": (0.0,) * 8}),
    "no slopes": ("bloom", {"slopes": None}),
    "other slopes": ("bloom", {"slopes": tuple(2.0**-i for i in range(8))}),
    "a window where sinks are": ("gpt_oss", {"window": WINDOW + 1}),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_terms_than_the_sources_are_caught_by_the_proof(case: str) -> None:
    name, change = WRONG[case]
    source = load_graph(exported(name))
    found = survey(source)
    assert found.roles is not None
    site = found.sites[0]
    prover = SiteProver(source.graph, found.roles, 5)
    prover.prove([site])
    with pytest.raises(ChaiError, match=r"layer 0: .* computes something else than causal attention"):
        prover.prove([replace(site, terms=replace(site.terms, **change))])


def test_the_slopes_of_a_model_are_its_nodes_input() -> None:
    nodes = [n for n in onnx.load(bundle_of("bloom").model_path).graph.node if n.domain == "chai"]
    assert [list(node.input[-2:]) for node in nodes] == [["", "alibi_slopes.0"]]
    sites = survey(load_graph(exported("bloom"))).sites
    assert sites[0].terms == ScoreTerms(slopes=tuple(2.0 ** -(i + 1) for i in range(8)))
    assert sites[0].terms.describe() == ", ALiBi"


def test_what_is_found_is_named_by_layer() -> None:
    sites = survey(load_graph(exported("gemma2"))).sites
    assert [site.terms for site in sites] == [ScoreTerms(WINDOW, 2.0), ScoreTerms(0, 2.0)]
    assert sites[0].terms.describe() == ", window 6, soft cap 2"
