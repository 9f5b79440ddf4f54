"""Plans without a model: exact allocation, correction, the file."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from chai_export.clustering.allocation import Frontier
from chai_export.clustering.clusters import Clusters
from chai_export.clustering.correction import Correction, loss_over_divergence
from chai_export.clustering.plan import Check, LayerPlan, Plan, WholePlan, load_plan
from chai_export.clustering.plan_parts import part_sentences, plan_parts
from chai_export.clustering.planner import Rule
from chai_export.errors import ChaiError, UsageError
from chai_export.op.heads import DecoderHeads

HEADS = DecoderHeads(8, 4, 64, 64, num_layers=2)


def random_options(seed: int) -> tuple[list[list[int]], list[list[float]]]:
    """Four caches of five options; some dominated, some of equal size."""
    rng = np.random.default_rng(seed)
    sizes = (4 * rng.integers(1, 12, (4, 5))).tolist()
    damage = rng.exponential(size=(4, 5)).round(2).tolist()
    return sizes, damage


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_the_best_of_all_choices(seed):
    sizes, damage = random_options(seed)
    frontier = Frontier(sizes, damage)

    def cost(choice: tuple[int, ...]) -> tuple[int, float]:
        rows = zip(sizes, damage, choice, strict=True)
        pairs = [(s[i], d[i]) for s, d, i in rows]
        return sum(size for size, _ in pairs), sum(lost for _, lost in pairs)

    every = [cost(choice) for choice in itertools.product(range(5), repeat=4)]
    assert frontier.least_bytes == min(size for size, _ in every)
    for limit in sorted({lost for _, lost in every})[:: len(every) // 20]:
        size, lost = cost(frontier.within_damage(limit + 1e-9))
        least = min(size for size, other in every if other <= limit + 1e-9)
        assert size == least
        assert lost == pytest.approx(min(other for s, other in every if s == least))
    for limit in range(frontier.least_bytes, max(size for size, _ in every) + 1, 4):
        size, lost = cost(frontier.within_bytes(limit))
        assert size <= limit
        assert lost == pytest.approx(min(other for s, other in every if s <= limit))


def test_more_loss_never_takes_more_bytes_and_more_bytes_never_lose_more():
    sizes, damage = random_options(7)
    frontier = Frontier(sizes, damage)

    def total(table: list[list[float]] | list[list[int]], choice: tuple[int, ...]) -> float:
        return sum(row[i] for row, i in zip(table, choice, strict=True))

    taken = [total(sizes, frontier.within_damage(limit)) for limit in np.linspace(1.0, 8.0, 30)]
    lost = [total(damage, frontier.within_bytes(limit)) for limit in range(frontier.least_bytes, 200, 4)]
    assert all(more <= less for less, more in itertools.pairwise(taken))
    assert all(more <= less + 1e-12 for less, more in itertools.pairwise(lost))
    assert taken[0] > taken[-1]
    assert lost[0] > lost[-1]


def test_out_of_reach_is_an_error_and_not_a_near_miss():
    frontier = Frontier([[8, 4]], [[0.1, 0.5]])
    with pytest.raises(ValueError, match="damage"):
        frontier.within_damage(0.05)
    with pytest.raises(ValueError, match="the least is 4"):
        frontier.within_bytes(3)


def whole(kl_sum: float, kl: float, ratio: float = 1.0, tokens: int = 10**8) -> WholePlan:
    return WholePlan(kl_sum=kl_sum, kl=kl, nll_change=ratio * kl, tokens=tokens)


def test_sums_are_corrected_by_whole_plans_and_interpolated_between_them():
    correction = Correction([whole(0.01, 0.02, 1.2), whole(0.1, 0.1)])
    assert correction.kl(0.01) == pytest.approx(0.02)
    assert correction.kl(0.1) == pytest.approx(0.1)
    assert correction.kl(math.sqrt(0.001)) == pytest.approx(math.sqrt(0.002))
    assert correction.kl(0.001) == pytest.approx(0.002)
    assert correction.nll_change(0.02) == pytest.approx(0.024, rel=1e-3)
    assert Correction([]).kl(0.03) == 0.03


def test_loss_over_divergence_is_believed_as_far_as_the_tokens_go():
    assert loss_over_divergence(whole(0.01, 0.01, 1.6)) == pytest.approx(1.6, rel=0.01)
    assert loss_over_divergence(whole(0.01, 0.01, 1.6, tokens=100)) == pytest.approx(1.0, abs=0.02)


def test_plans_stay_below_the_bound_by_what_the_check_may_scatter():
    correction = Correction([whole(0.001, 0.002), whole(0.1, 0.2)])
    few, many = (correction.sum_for(0.01, tokens) for tokens in (2000, 2 * 10**6))
    assert few < many < 0.005  # 0.01 in truth, less a tenth
    assert correction.kl(few) + 1.3 * math.sqrt(2 * correction.kl(few) / 2000) < 0.01
    assert many > 0.0042


def a_plan(**changes: object) -> Plan:
    layers = (
        LayerPlan(kept_heads=4, key_bits=8, value_bits=4),
        LayerPlan(kept_heads=2, key_bits=4, value_bits=4),
    )
    sizes = {"num_query_heads": 8, "num_kv_heads": 4, "head_dim": 64, "value_head_dim": 64}
    return Plan.model_validate({"layers": layers, "group": 32, **sizes, **changes})


def test_plans_survive_the_file(tmp_path):
    plan = a_plan(rule="loss 0.01", kv_bytes_share=0.4)
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan.model_copy(update={"origin": str(tmp_path / "plan.json")})
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["format"] == "chai-plan/1"
    assert content["layers"][1] == {"kept_heads": 2, "key_bits": 4, "value_bits": 4}
    assert "origin" not in content


def test_either_format_is_read(tmp_path):
    path = tmp_path / "either.json"
    path.write_text(json.dumps({"format": "chai-clusters/1", "kept_heads": [4, 2]}))
    found = load_plan(path)
    assert isinstance(found, Clusters)
    assert found.kept_heads == (4, 2)
    path.write_text(
        json.dumps({"format": "chai-plan/1", "layers": [{"kept_heads": 1, "key_bits": 8, "value_bits": 16}]})
    )
    assert load_plan(path).kept_heads == (1,)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([], "layers"),
        ([{"kept_heads": 0, "key_bits": 8, "value_bits": 8}], "kept_heads"),
        ([{"kept_heads": 1.0, "key_bits": 8, "value_bits": 8}], "kept_heads"),
        ([{"kept_heads": 1, "key_bits": 7, "value_bits": 8}], "key_bits"),
        ([{"kept_heads": 1, "key_bits": 8}], "value_bits"),
        (None, "layers"),
    ],
)
def test_damaged_plans_are_refused_in_one_line(tmp_path, layers, reason):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": "chai-plan/1", "layers": layers}))
    with pytest.raises(ChaiError, match=reason) as refused:
        load_plan(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_formats_and_missing_files_are_named(tmp_path):
    with pytest.raises(ChaiError, match="make it with chai-export calibrate"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"format": "chai-plan/2"}')
    with pytest.raises(ChaiError, match="'chai-plan/2' instead of 'chai-plan/1'"):
        load_plan(tmp_path / "other.json")


def test_a_plan_fits_its_model_only():
    a_plan().check(HEADS)
    with pytest.raises(ChaiError, match="2 layers, the model has 3"):
        a_plan().check(DecoderHeads(8, 4, 64, 64, num_layers=3))
    with pytest.raises(ChaiError, match="layer 0 keeps 4 KV heads"):
        a_plan().check(DecoderHeads(8, 2, 64, 64, num_layers=2))
    with pytest.raises(ChaiError, match="group must divide the head dim 48"):
        a_plan().check(DecoderHeads(8, 4, 48, 64, num_layers=2))
    same_kept = tuple(LayerPlan(kept_heads=4, key_bits=bits, value_bits=8) for bits in (8, 4))
    with pytest.raises(ChaiError, match="key_bits of layer 1 is 4, and 8 of layer 0"):
        a_plan(layers=same_kept).check(DecoderHeads(8, 4, 64, 64, num_layers=2, kv_source_layers=[0, 0]))


def test_parts_add_up_to_what_the_plan_saves():
    plan = a_plan()
    parts = plan_parts(plan, HEADS)
    # Rows of 64 elements: 128 bytes in float16, 68 in 8 bits, 40 in 4; four heads.
    assert parts.values == pytest.approx(2 * 4 * (128 - 40) / 2048)
    assert parts.keys == pytest.approx(4 * (128 - 68 + 128 - 40) / 2048)
    assert parts.heads == pytest.approx(2 * 40 / 2048)
    heads, keys, values = part_sentences(plan, HEADS)
    assert heads == "heads: 75% of keys kept: -4%"
    assert keys == "keys in 8 and 4 bits: -29%"
    assert values == "values in 4 bits: -34%"


def test_heads_that_have_nothing_to_give_are_told_so():
    every = tuple(LayerPlan(kept_heads=4, key_bits=8, value_bits=8) for _ in range(2))
    assert part_sentences(a_plan(layers=every), HEADS)[0] == "heads: none redundant"


def test_only_forced_plans_warn():
    check = Check(
        perplexity_ratio=1.03, kl=0.03, tokens=10, windows=1, top1_agreement=0.9, perplexity_error=0.01
    )
    assert a_plan(checked=check).forced_warning() is None
    warning = a_plan(checked=check, forced=True, rule="loss 0.01").forced_warning()
    assert (
        warning == "the plan was forced: asked for loss 0.01, it raised perplexity by 3.00% on held-out text"
    )


@pytest.mark.parametrize("loss", [0, -0.1, 1.5, math.nan, math.inf, "0.01", True])
def test_losses_without_meaning_are_wrong_usage(loss):
    with pytest.raises(UsageError, match="--loss"):
        Rule.asked(loss, None)


@pytest.mark.parametrize("share", [0, -1, 1.1, math.nan, "half"])
def test_shares_of_bytes_without_meaning_are_wrong_usage(share):
    with pytest.raises(UsageError, match="--bytes"):
        Rule.asked(None, share)


def test_one_rule_at_a_time_and_one_percent_without_any():
    assert Rule.asked(None, None) == Rule(loss=0.01)
    with pytest.raises(UsageError, match="give one of them"):
        Rule.asked(0.01, 0.4)
