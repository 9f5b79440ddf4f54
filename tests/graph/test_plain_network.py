"""The op in plain ONNX with caches that have no pages computes what the op does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.engines.plain_network import plain_network
from chai_export.errors import ChaiError
from chai_export.graph.stage import rewrite
from tests.helpers.contiguous_runner import ContiguousRunner
from tests.helpers.exported import bundle_of, exported, kept_of
from tests.helpers.graph_runner import GraphRunner

PROMPTS = ([5, 11, 7, 90, 3, 3, 64, 21, 8], [17, 2, 40, 33, 9, 71], [80])
STEPS = (
    (PROMPTS, "prompts of several lengths"),
    ([[1, 2, 3], [4], []], "a chunk, a token and an inactive row"),
    ([[10], [20], [30]], "a token each"),
    ([[], [21], []], "one row of three"),
    ([[], [], [31, 32]], "one of few tokens yet"),
)
TOLERANCE = 1e-4
AT_ONCE = ("llama-gqa", "gpt2", "gpt_oss")
"""Two layers; all heads have keys of their own; sinks and a window."""
LATER = ("qwen3-gqa", "falcon-mqa", "gemma2", "bloom", "mistral-window", "phi-gqa", "cohere2-window", "opt")
FAMILIES = [*AT_ONCE, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]


def both(bundle: Bundle, batch: int, heads: str) -> tuple[GraphRunner, ContiguousRunner]:
    return GraphRunner(bundle, batch, 16, heads), ContiguousRunner(bundle, batch, 16, heads)


def compare(op: GraphRunner, plain: GraphRunner, rows: list[list[int]], what: str) -> None:
    wanted, got = op.step(rows), plain.step(rows)
    np.testing.assert_array_equal(plain.head_map, op.head_map, err_msg=what)
    for row, new in enumerate(rows):
        np.testing.assert_allclose(
            got[row, : len(new)], wanted[row, : len(new)], atol=TOLERANCE, err_msg=what
        )


def stored_in(bits: int, place: Path) -> Bundle:
    """Keys and values in ``bits``."""
    name = "qwen3-gqa"
    clusters = Clusters(kept_of(name))
    return rewrite(exported(name), clusters, place / "bundle", key_bits=bits, value_bits=bits)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_maps_and_logits_are_the_ops_in_every_phase(name: str, heads: str) -> None:
    op, plain = both(bundle_of(name), len(PROMPTS), heads)
    for rows, what in STEPS:
        compare(op, plain, list(rows), what)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt_oss"])
def test_a_row_that_begins_with_one_token_has_the_ops_map(name: str) -> None:
    """Where no call has more, the choice has no steps, unless sinks make one token's probabilities differ."""
    op, plain = both(bundle_of(name), 2, "chai")
    for rows in ([[5], [90]], [[7], [3]]):
        compare(op, plain, rows, str(rows))


def test_nothing_but_onnx_is_in_the_graph() -> None:
    bundle = bundle_of("gpt_oss")
    model = plain_network(bundle)
    assert not model.functions
    found = list(nodes(model.graph))
    assert {node.domain for node in found} <= {"", "ai.onnx"}
    assert "If" not in {node.op_type for node in found}
    assert not [value.name for value in model.graph.input if value.name.startswith("page_table")]
    past = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    kept = [past[f"past_key.{layer}"][1].dim_value for layer in range(bundle.manifest.num_layers)]
    assert kept == list(bundle.manifest.kept_heads)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_caches_in_other_types_are_refused_by_name(bits: int, tmp_path: Path) -> None:
    with pytest.raises(ChaiError, match=f"caches in {bits} bits"):
        plain_network(stored_in(bits, tmp_path))
