"""Clustering methods: they find what was planted, keep what they may, and never depend on chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from chai_export.errors import UsageError
from chai_export.models.oracle import probe_features
from chai_export.op.head_map import kept_kv_heads
from chai_export.quality import methods_medoids as medoids
from chai_export.quality.methods import METHODS, methods_named
from tests.helpers.planted import GQA_GROUPS, MHA_GROUPS, distinct, planted_model

ONLINE = [name for name, method in METHODS.items() if method.rule is not None]
FINDING = [name for name in ONLINE if name != "random"]
TOKENS = np.random.default_rng(11).integers(3, 128, 12).tolist()


@pytest.fixture(scope="module", params=["mha", "gqa"])
def planted(request):
    groups, query_heads = (MHA_GROUPS, 8) if request.param == "mha" else (GQA_GROUPS, 8)
    return groups, probe_features(planted_model(groups, query_heads), [TOKENS], len(TOKENS))


def random_probabilities(heads, tokens=6, seed=0):
    weights = np.tril(np.random.default_rng(seed).random((heads, tokens, tokens)).astype(np.float32) ** 4)
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", FINDING)
def test_every_rule_finds_the_planted_groups(planted, name):
    groups, features = planted
    for letters, kept, layer in zip(groups, distinct(groups), features, strict=True):
        group = layer.shape[1] // len(letters)
        head_map = METHODS[name].rule(layer[0], len(letters), kept, 0)
        found = "".join(letters[head // group] for head in head_map[::group])
        assert found == letters


def test_random_maps_do_not_find_the_planted_groups(planted):
    groups, features = planted
    right = 0
    for letters, kept, layer in zip(groups, distinct(groups), features, strict=True):
        head_map = METHODS["random"].rule(layer[0], len(letters), kept, 0)
        group = layer.shape[1] // len(letters)
        right += [letters[head // group] for head in head_map[::group]] == list(letters)
    # Layers of one group, or of as many as heads, cannot be missed.
    assert right < len(groups)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(("kv_heads", "kept"), [(8, 3), (8, 1), (8, 8), (4, 2), (2, 1)])
def test_a_map_keeps_no_more_kv_heads_than_allowed_and_representatives_stand_for_themselves(
    name, kv_heads, kept
):
    head_map = METHODS[name].rule(random_probabilities(8), kv_heads, kept, 5)
    assert head_map.dtype == np.int32
    assert len(kept_kv_heads(head_map, 8 // kv_heads)) <= kept
    assert (head_map[head_map] == head_map).all()
    if kept == kv_heads:
        assert (head_map == np.arange(8)).all()


def test_the_same_probabilities_and_seed_give_the_same_map():
    for name in ONLINE:
        first, second = (METHODS[name].rule(random_probabilities(8), 8, 3, 1) for _ in range(2))
        assert (first == second).all()


def error(distance, chosen):
    return int(distance[:, chosen].min(axis=1).sum())


@pytest.mark.parametrize("measure", [medoids.squared_distance, medoids.absolute_distance])
def test_choosing_again_never_raises_the_error_and_often_reaches_the_best_choice(measure):
    best = 0
    for seed in range(20):
        distance = measure(random_probabilities(8, seed=seed))
        errors = [error(distance, medoids.refined_order(distance, 8, 3, passes)) for passes in (0, 1, 2)]
        assert errors == sorted(errors, reverse=True)
        optimum = min(error(distance, list(c)) for c in itertools.combinations(range(8), 3))
        best += errors[1] == optimum
    assert best >= 14


def test_without_a_second_pass_the_choice_is_the_greedy_one():
    for seed in range(10):
        distance = medoids.squared_distance(random_probabilities(8, seed=seed))
        greedy = medoids.greedy_map(distance, 8, 3)
        assert (medoids.refined_map(distance, 8, 3, passes=0) == greedy).all()


def test_distances_are_zero_between_equal_heads_only():
    probabilities = random_probabilities(4)
    probabilities[2] = probabilities[0]
    for measure in (medoids.squared_distance, medoids.absolute_distance, medoids.cosine_distance):
        distance = measure(probabilities)
        assert (distance == distance.T).all()
        assert {tuple(pair) for pair in np.argwhere(distance == 0)} == {
            (0, 0), (1, 1), (2, 2), (3, 3), (0, 2), (2, 0),
        }  # fmt: skip


def test_the_reference_rule_represents_a_cluster_by_its_lowest_head():
    probabilities = random_probabilities(6)
    probabilities[4] = probabilities[1]
    head_map = METHODS["agglomerative"].rule(probabilities, 6, 5, 0)
    assert head_map.tolist() == [0, 1, 2, 3, 1, 5]


def test_an_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match="'medoid'; choose from chai, greedy"):
        methods_named(["medoid"])
