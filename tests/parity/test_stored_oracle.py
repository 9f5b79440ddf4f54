"""The torch oracle on rows as the cache stores them: the truth that bundles of fewer bits are held to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.models.logits import differences
from chai_export.models.stored_rows import StoredRounding, read_back
from chai_export.op.storage import BITS, Storage
from chai_export.quality.truth import TorchTruth
from tests.helpers.exported import exported, model_of
from tests.helpers.graph_mistakes import exchanged_queries, larger_scores, late_positions, with_mistake

NAME = "llama-gqa"
TOKENS = np.random.default_rng(1).integers(3, 96, 60).tolist()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    made: dict[tuple[int, int], Bundle] = {}

    def make(key_bits: int, value_bits: int) -> Bundle:
        if (key_bits, value_bits) not in made:
            made[key_bits, value_bits] = ce.rewrite(
                exported(NAME), Clusters((2, 1)), tmp_path_factory.mktemp("stored") / "bundle",
                key_bits=key_bits, value_bits=value_bits,
            )  # fmt: skip
        return made[key_bits, value_bits]

    return make


def rows() -> np.ndarray:
    generator = np.random.default_rng(0)
    sizes = 10.0 ** generator.integers(-9, 4, (3, 40, 1))
    made = (generator.standard_normal((3, 40, 64)) * sizes).astype(np.float32)
    made[0, 0], made[0, 1], made[0, 2, :32] = 0.0, 3.5, -1e-9
    return made


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 8])
def test_rows_are_read_back_bit_by_bit_as_the_reference_reads_them(bits, group):
    storage = Storage(bits, 64, group)
    wanted = storage.load(*storage.store(rows()), np.float32)
    found = read_back(torch.from_numpy(rows()), storage, StoredRounding()).numpy()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_rows_near_the_middle_of_two_stored_numbers_go_the_other_way(bits):
    storage, given = Storage(bits, 64, 32), torch.from_numpy(rows())
    plain, moved = (read_back(given, storage, StoredRounding(ties)) for ties in (0.0, 0.05))
    share = float((plain != moved).float().mean())
    # The fraction of a code is spread evenly, so 2 * 0.05 of them lie that close, and more where scales move.
    assert 0.05 < share < 0.9
    largest = {16: 2e-3, 8: 2e-2, 4: 0.2}[bits] * given.abs().amax(
        -1, keepdim=True
    ) + 1e-5  # scales end there
    assert ((given - moved).abs() <= largest).all()


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (0, 16)])
def test_verify_holds_a_bundle_to_the_rows_that_it_stores(bits, bundles):
    result = ce.verify(bundles(*bits).path, model_of(NAME), new_tokens=24)
    assert result.ok, result
    for heads in ("all", "chai"):
        distance = result.distance_to_exact[heads]
        assert result.max_abs_logit_diff[heads] < distance["max_abs_logit_diff"] / 4
        assert distance["kl"] > 0
    assert result.to_json()["distance_to_exact"] == result.distance_to_exact
    assert [(gate.name, gate.heads) for gate in result.gates] == [
        ("exact rows", "all"),
        ("exact rows", "chai"),
    ]
    assert all(0.0 < gate.tolerance_used <= 1.0 and gate.tolerance < 1e-3 for gate in result.gates)


@pytest.mark.parametrize(
    "mistake", [larger_scores, late_positions, exchanged_queries], ids=lambda mistake: mistake.__name__
)
def test_storing_rows_hides_no_mistake_of_the_graph(mistake, bundles, tmp_path):
    """Its graph is compared with exact rows, too: what storing moves would let small mistakes pass."""
    broken = with_mistake(bundles(8, 4), tmp_path / "broken", mistake)
    result = ce.verify(broken.path, model_of(NAME), new_tokens=8)
    assert not result.ok
    used = {gate.heads: gate.tolerance_used for gate in result.gates}
    assert set(used) == {"all", "chai"}
    assert min(used.values()) > 3.0


def test_caches_in_the_dtype_have_no_distance(bundles):
    result = ce.verify(bundles(0, 0).path, model_of(NAME), new_tokens=8)
    assert result.ok
    assert result.to_json()["distance_to_exact"] is None


@pytest.mark.parametrize("stored", [(0, 0), (8, 4), (0, 16)])
@pytest.mark.parametrize("heads", ["all", "chai"])
def test_rows_in_another_storage_are_not_taken_for_right(stored, heads, bundles):
    runner = ce.load(bundles(*stored).path, heads=heads)
    truth = TorchTruth(model_of(NAME), bundles(8, 8))
    engine = runner.logits(TOKENS)
    maps = runner.head_maps[:, 0]
    expected = truth.all_heads(TOKENS) if heads == "all" else truth.chai(TOKENS, maps)
    assert (differences(engine, expected.logits) / expected.tolerances).max() > 1.5
    own = TorchTruth(model_of(NAME), bundles(*stored))
    right = own.all_heads(TOKENS) if heads == "all" else own.chai(TOKENS, maps)
    assert (differences(engine, right.logits) / right.tolerances).max() < 1.0


def test_tokens_of_the_probe_read_what_was_computed(bundles):
    """With the storage of all tokens in the oracle, those of the probe would be off, too."""
    truth = TorchTruth(model_of(NAME), bundles(8, 4))
    expected = truth.all_heads(TOKENS)
    probe = bundles(8, 4).manifest.probe_tokens
    np.testing.assert_allclose(expected.logits[:probe], expected.exact[:probe], atol=1e-4)
    assert differences(expected.logits, expected.exact)[probe:].max() > 1e-2


def test_eval_measures_what_the_bits_cost(bundles):
    text = np.random.default_rng(4).integers(3, 96, 200).tolist()
    options = {"window": 64, "prompts": 0, "reference": model_of(NAME)}
    exact, fewer = (ce.evaluate(bundles(*bits).path, text, **options) for bits in ((0, 0), (8, 4)))
    assert exact["all"] == fewer["all"]
    assert fewer["kl"] != exact["kl"]
    assert fewer["chai"]["perplexity"] == pytest.approx(exact["chai"]["perplexity"], rel=0.05)
