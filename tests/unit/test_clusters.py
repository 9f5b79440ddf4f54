"""clusters.json and the rules of --keep."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from chai_export.clustering.clusters import Clusters
from chai_export.clustering.equaliser import equaliser
from chai_export.clustering.keep import allocate, elbow, parse_keep
from chai_export.errors import ChaiError, UsageError
from chai_export.op.heads import DecoderHeads


def geometry(layers=4, groups=8, head_dim=16, value_head_dim=16):
    return DecoderHeads(16, groups, head_dim, value_head_dim, num_layers=layers)


def random_curves(layers=4, groups=8, seed=0):
    steps = np.random.default_rng(seed).random((layers, groups))
    steps[:, -1] = 0.0
    return np.cumsum(steps[:, ::-1], axis=1)[:, ::-1].tolist()


def test_what_is_saved_is_loaded_again(tmp_path):
    clusters = Clusters((3, 1), "m", 2, 8, 4, 5, "rule", ((1.0, 0.5, 0.1, 0.0), (0.0,) * 4), 0.25, "x 1")
    path = tmp_path / "clusters.json"
    clusters.save(path)
    assert Clusters.load(path) == clusters
    assert json.loads(path.read_text())["format"] == "chai-clusters/1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["clusters.json"]


def test_only_format_and_kept_heads_are_required_and_other_keys_are_ignored(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"format": "chai-clusters/1", "kept_heads": [2, 3], "note": {"by": "hand"}}')
    clusters = Clusters.load(path)
    assert clusters.kept_heads == (2, 3)
    clusters.check(geometry(layers=2))


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"format": "chai-clusters/2", "kept_heads": [1]}', '{"format": "chai-clusters/1"}',
        '{"format": "chai-clusters/1", "kept_heads": []}', '{"format": "chai-clusters/1", "kept_heads": [0]}',
        '{"format": "chai-clusters/1", "kept_heads": [1.5]}',
        '{"format": "chai-clusters/1", "kept_heads": [true]}',
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ChaiError, match=r"c\.json"):
        Clusters.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("error_curves", "x"), ("error_curves", ["x", "y"]), ("error_curves", [[1, "0"], [1, 0]]),
        ("error_curves", [[1, None], [1, 0]]), ("error_curves", [[True, 0], [1, 0]]),
        ("error_curves", [[1, 0]]), ("error_curves", [[1, 0], [1]]), ("error_curves", [[], []]),
        ("error_curves", [[1], [1]]), ("error_curves", {"0": [1, 0]}), ("error_curves", None),
        ("kl_curves", [[1, "0"], [1, 0]]), ("num_layers", "2"), ("num_kv_heads", 2.5), ("probe_tokens", True),
        ("probe_tokens", 0), ("model", 7), ("method", ["x"]), ("kv_bytes_saved", "10 %"),
        ("kept_heads", "21"), ("kept_heads", [2, None]), ("kept_heads", {"0": 2}), ("kept_heads", ["2", 1]),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named(tmp_path, field, value):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"format": "chai-clusters/1", "kept_heads": [2, 1], field: value}))
    with pytest.raises(ChaiError, match=rf"c\.json: {field}") as caught:
        Clusters.load(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "kept", [None, 3, "21", b"21", (2.0, 1), ("2", 1), (True, 1), (0, 1), (None,), (2**40, 1)]
)
def test_numbers_of_another_kind_are_refused(kept):
    with pytest.raises(UsageError):
        Clusters(kept)


def test_numbers_of_any_library_are_taken(tmp_path):
    clusters = Clusters(np.array([3, 1]))
    assert clusters.kept_heads == (3, 1)
    clusters.save(tmp_path / "c.json")
    assert Clusters.load(tmp_path / "c.json") == clusters


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ChaiError, match="chai-export calibrate"):
        Clusters.load(tmp_path / "c.json")


def test_clusters_of_another_model_are_refused():
    with pytest.raises(ChaiError, match="3 layers, the model has 4"):
        Clusters((1, 1, 1)).check(geometry())
    with pytest.raises(ChaiError, match="layer 2 keeps 9"):
        Clusters((1, 8, 9, 1)).check(geometry())


def test_elbow_is_where_nothing_is_left_or_the_curve_is_flat():
    assert elbow([5.0, 2.0, 0.0, 0.0]) == 3  # exact duplicates
    assert elbow([0.0, 0.0, 0.0]) == 1  # all heads equal
    assert elbow([5.0, 4.0, 3.0, 0.0]) == 4  # nothing redundant
    assert elbow([1.0]) == 1
    assert elbow([100.0, 20.0, 0.8, 0.4, 0.2, 0.0]) == 3  # near duplicates
    assert elbow([100.0, 0.9, 0.1, 0.06, 0.03, 0.0]) == 3  # goes down a cliff below the first threshold


def test_every_head_kept():
    assert parse_keep("all").choose(random_curves(), geometry()) == (8, 8, 8, 8)


def test_layers_of_one_cache_get_one_number_from_the_sum_of_their_curves():
    shape = dataclasses.replace(geometry(), kv_source_layers=(0, 0, 2, 0))
    distinct = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    more = [1.0, 0.5, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert parse_keep("elbow").choose([distinct, more, distinct, distinct], shape) == (4, 4, 2, 4)
    curves = random_curves()
    for share in (0.1, 0.3):
        kept = parse_keep(f"budget:{share}").choose(curves, shape)
        assert kept[0] == kept[1] == kept[3]
        # Two caches of 8 KV heads: one head is 1/32 of their bytes.
        assert 0 <= shape.kv_bytes_saved(kept) - share + 1e-9 < 1 / 32
    with pytest.raises(ChaiError, match="layer 1 keeps 3 KV heads and reads the cache of layer 0"):
        parse_keep("4,3,8,4").check(shape)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.214, 0.25, 0.3, 0.4375])
@pytest.mark.parametrize("value_head_dim", [16, 8])
def test_a_budget_is_met_to_within_one_head(share, value_head_dim):
    shape = geometry(value_head_dim=value_head_dim)
    kept = parse_keep(f"budget:{share}").choose(random_curves(), shape)
    one_head = 16 / (4 * 8 * (16 + value_head_dim))
    assert 0 <= shape.kv_bytes_saved(kept) - share + 1e-9 < one_head
    assert all(1 <= number <= 8 for number in kept)


@pytest.mark.parametrize("rule", ["budget:0.44", "budget:0.9"])
def test_a_budget_out_of_reach_names_the_largest(rule):
    with pytest.raises(ChaiError, match=r"0\.4375"):
        parse_keep(rule).check(geometry())


def test_allocation_is_the_best_of_all_and_deterministic():
    curves = random_curves(layers=3, groups=4, seed=3)
    for drop in range(10):
        ways = [k for k in itertools.product(range(1, 5), repeat=3) if sum(k) == 12 - drop]
        cheapest = min(sum(curve[k - 1] for curve, k in zip(curves, way, strict=True)) for way in ways)
        kept = allocate(curves, drop)
        assert sum(kept) == 12 - drop
        got = sum(curve[k - 1] for curve, k in zip(curves, kept, strict=True))
        assert got == pytest.approx(cheapest)
    assert allocate([[0.0] * 4] * 3, 4) == (4, 3, 1)


def test_a_budget_takes_what_lies_past_the_elbows_before_anything_else():
    redundant = [1.0, 0.3, 0.005, 0.004, 0.003, 0.002, 0.001, 0.0]
    # Its last heads cost less than the redundant layer's, but they are no repetition.
    full = [0.02, 0.015, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0]
    shape = geometry(layers=2)
    assert (elbow(redundant), elbow(full)) == (3, 8)
    for drop in range(6):
        kept = parse_keep(f"budget:{drop / 32}").choose([redundant, full], shape)
        assert kept == (8 - drop, 8)
    assert parse_keep(f"budget:{7 / 32}").choose([redundant, full], shape) == (3, 6)


def test_numbers_and_a_file_are_taken_as_they_are(tmp_path):
    assert parse_keep("8,3,2,1").choose([], geometry()) == (8, 3, 2, 1)
    path = tmp_path / "other.json"
    Clusters((4, 4, 4, 4)).save(path)
    assert parse_keep(f"@{path}").choose([], geometry()) == (4, 4, 4, 4)
    with pytest.raises(ChaiError, match="--keep 8,3 is for 2 layers"):
        parse_keep("8,3").check(geometry())


@pytest.mark.parametrize(
    "rule",
    ["", "elbows", "budget:", "budget:x", "budget:nan", "1;2", "1,,2", "1,0",
     "budget:-0.1", "budget:1", "budget:7", "budget:1e999", "9" * 5000, "9" * 30, "1,2.0"],
)  # fmt: skip
def test_an_unknown_rule_is_wrong_usage(rule):
    with pytest.raises(UsageError, match="--keep"):
        parse_keep(rule)


PEAKS = (((1.0, 2.0), (0.0, 4.0)), ((3.0, 1.0), (1.0, 1.0)))


def test_peaks_of_keys_are_kept(tmp_path):
    clusters = Clusters((2, 1), key_peaks=PEAKS)
    clusters.save(tmp_path / "c.json")
    assert Clusters.load(tmp_path / "c.json") == clusters
    assert "key_peaks" not in Clusters((2, 1)).to_json()


@pytest.mark.parametrize(
    ("peaks", "reason"),
    [
        (PEAKS[:1], "key_peaks is for 1 of 2 layers"),
        ((PEAKS[0], (*PEAKS[1][:1], (1.0,))), "differs in its sizes"),
        (((*PEAKS[0][:1], (-1.0, 1.0)), PEAKS[1]), "greater than or equal to 0"),
        ("", "key_peaks"),
        ((PEAKS[0], 3), "key_peaks"),
    ],
)
def test_peaks_that_do_not_fit_are_refused(tmp_path, peaks, reason):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"format": "chai-clusters/1", "kept_heads": [2, 1], "key_peaks": peaks}))
    with pytest.raises(ChaiError, match=reason) as caught:
        Clusters.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_equaliser_follows_the_square_root_of_the_peaks():
    peaks = np.array([[1e-9, 4.0, 16.0], [1.0, 1.0, 0.0]])
    factors = equaliser(peaks.tolist())
    assert factors.dtype == np.float32
    assert factors.shape == (2, 3)
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-6)
    assert factors[0, 2] / factors[0, 1] == pytest.approx(2)
    assert factors[0, 1] / factors[1, 0] == pytest.approx(2)
    # What calibration saw nothing in is like what it saw little in.
    assert factors[0, 0] == factors[1, 2] == pytest.approx(factors[0, 2] * 1e-3**0.5)
    assert (equaliser([[0.0, 0.0]]) == 1).all()
