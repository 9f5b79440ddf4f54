"""Probabilities in torch are those of the op's NumPy reference, whatever becomes of scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chai_export.models import attention
from chai_export.models.attention import causal_attention, probe_probabilities
from chai_export.models.scoring import Scoring
from chai_export.op.attend import HeadTerms, probabilities
from chai_export.op.attributes import Attributes

HEADS, TOKENS, DIM = 4, 9, 8
TERMS = {
    "plain": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": [0.5, -2.0, 3.0, float("-inf")]},
    "slopes": {"slopes": [0.5, 0.25, 0.125, 0.0]},
    "all": {"window": 4, "softcap": 2.0, "sinks": [0.1, 0.2, 0.3, 0.4], "slopes": [0.4, 0.3, 0.2, 0.1]},
}
each = pytest.mark.parametrize("name", TERMS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def both(name: str) -> tuple[Scoring, Attributes, HeadTerms]:
    given = TERMS[name]
    arrays = {part: np.array(given[part], np.float32) for part in ("sinks", "slopes") if part in given}
    tensors = {part: torch.from_numpy(array) for part, array in arrays.items()}
    numbers = {part: given[part] for part in ("window", "softcap") if part in given}
    terms = HeadTerms(arrays.get("sinks"), arrays.get("slopes"))
    return Scoring(0.7, **numbers, **tensors), Attributes(0.7, **numbers), terms


@each
@pytest.mark.parametrize(("first_query", "first_key"), [(0, 0), (5, 0), (7, 5)])
def test_probabilities_are_those_of_the_reference(name: str, first_query: int, first_key: int) -> None:
    scoring, attributes, terms = both(name)
    products = random(HEADS, 3, first_query + 3 - first_key)
    got = scoring.probabilities(products, first_query, first_key).numpy()
    for head in range(HEADS):
        scaled = products[head].numpy() * np.float32(0.7)
        expected = probabilities(scaled, first_query, first_key, attributes, terms, head)
        np.testing.assert_allclose(got[head], expected, atol=1e-6)


@each
@pytest.mark.parametrize("block", [1, 2, 5])
def test_blocks_of_queries_read_what_they_see(name: str, block: int, monkeypatch) -> None:
    scoring, attributes, terms = both(name)
    query, key, value = (random(1, HEADS, TOKENS, DIM, seed=seed) for seed in range(3))
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    got = causal_attention(query, key, value, scoring)[0].numpy()
    for head in range(HEADS):
        scaled = (query[0, head] @ key[0, head].T).numpy() * np.float32(0.7)
        expected = probabilities(scaled, 0, 0, attributes, terms, head) @ value[0, head].numpy()
        np.testing.assert_allclose(got[head], expected, atol=1e-5)


@each
def test_a_head_map_is_chosen_by_the_probabilities_that_the_layer_uses(name: str) -> None:
    scoring, attributes, terms = both(name)
    query, key = random(1, HEADS, TOKENS, DIM), random(1, 2, TOKENS, DIM, seed=1)
    got = probe_probabilities(query, key, scoring, 6)[0].numpy()
    for head in range(HEADS):
        scaled = (query[0, head, :6] @ key[0, head // 2, :6].T).numpy() * np.float32(0.7)
        np.testing.assert_allclose(got[head], probabilities(scaled, 0, 0, attributes, terms, head), atol=1e-6)
