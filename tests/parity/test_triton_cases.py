"""The op's cases on the Triton kernels: in the interpreter without a GPU, compiled where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chai_export.errors import ChaiError
from chai_export.kernels import Shape, Spec, clustered_head_attention, workspace_bytes
from chai_export.kernels.blocks import INTERPRETER, Blocks, KernelBlocks, choose
from chai_export.kernels.case_runner import case_inputs, check_result, run_case, to_tensors
from chai_export.kernels.device.head_map import head_map_kernel
from chai_export.op.cases import CASES, Case
from chai_export.op.head_map import cluster_heads, distances

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY_NAME = {case.name: case for case in CASES}

# In half precision only what takes another path than in float32: rounded weights, narrow loads, odd dims.
HALF_IN_CI = (
    "h8_g2_r1",
    "fresh_s1",
    "decode_batch",
    "mixed_phases",
    "value_dim_larger",
    "odd_head_dim",
    "offline",
)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_agrees_with_the_reference_in_float32(case: Case) -> None:
    run_case(case, "float32", DEVICE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", HALF_IN_CI)
def test_case_agrees_with_the_reference_in_half_precision(name: str, dtype: str) -> None:
    run_case(BY_NAME[name], dtype, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in HALF_IN_CI], ids=lambda case: case.name)
def test_every_case_agrees_in_half_precision(case: Case, dtype: str) -> None:
    run_case(case, dtype, DEVICE)


@pytest.mark.parametrize("members", [1, 4])
@pytest.mark.parametrize("name", ["h8_g2_r1", "twins_exact_ties", "offline"])
def test_prefill_does_not_depend_on_the_size_of_pieces(name: str, members: int) -> None:
    run_case(BY_NAME[name], "float32", DEVICE, blocks=_blocks(prefill={"MEMBERS": members}))


@pytest.mark.parametrize(
    ("name", "programs"), [("decode_batch", 1), ("decode_batch", 1000), ("long_cache", 1)]
)
def test_decode_does_not_depend_on_the_number_of_splits(name: str, programs: int) -> None:
    run_case(
        BY_NAME[name], "float32", DEVICE, blocks=_blocks(score_programs=programs, value_programs=programs)
    )


def test_decode_takes_many_query_heads_of_one_kv_head() -> None:
    run_case(Case("multi_query", 80, 1, 1, ((9, 1), (0, 1)), head_dim=16), "float32", DEVICE)


def test_largest_sizes_are_accepted() -> None:
    run_case(Case("largest", 128, 128, 5, ((0, 6),), head_dim=16, capacity=8), "float32", DEVICE)
    run_case(Case("widest", 2, 2, 1, ((3, 2),), head_dim=256, capacity=8), "float32", DEVICE)


def test_appending_in_place_equals_appending_to_a_copy() -> None:
    for name in ("mixed_phases", "decode_batch"):
        case = BY_NAME[name]
        inputs = case_inputs(case, "float32")
        tensors = to_tensors(inputs, "float32", DEVICE)
        result = clustered_head_attention(
            **tensors, present_key=tensors["past_key"], present_value=tensors["past_value"]
        )
        assert result.present_key is tensors["past_key"]
        check_result(case, inputs, result, "float32")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kept"), [(8, 8, 3), (8, 4, 3), (12, 3, 2), (33, 11, 7), (6, 6, 1)]
)
def test_head_map_equals_the_reference_for_the_same_integers(heads: int, kv_heads: int, kept: int) -> None:
    """Few distinct values, so that most distances tie."""
    rng = np.random.default_rng(heads * 100 + kept)
    rows, probe = 3, 4
    quantised = rng.integers(0, 3, size=(rows, heads, probe, probe)).astype(np.int32) * 512
    flat = torch.from_numpy(np.ascontiguousarray(quantised.reshape(rows, heads, -1).swapaxes(1, 2))).to(
        DEVICE
    )
    result = torch.full((rows, heads), -1, dtype=torch.int32, device=DEVICE)
    plan = torch.empty((rows, 2 * kv_heads + 2 * heads + 1), dtype=torch.int32, device=DEVICE)
    lengths = torch.full((rows,), 8, dtype=torch.int32, device=DEVICE)
    head_map_kernel[(rows,)](
        flat, torch.full_like(result, -9), torch.zeros_like(lengths), lengths, result, plan, 8, 16, kept, 1,
        HEADS=heads, KV_HEADS=kv_heads, PROBE=probe, MEMBERS=2,
        HEADS_PADDED=_power_of_two(heads), KV_PADDED=_power_of_two(kv_heads),
    )  # fmt: skip
    expected = np.stack([cluster_heads(distances(u), kv_heads, kept) for u in quantised])
    assert np.array_equal(result.cpu().numpy(), expected)
    _check_pieces(plan.cpu().numpy()[:, 2 * kv_heads + heads :], expected, members=2)


def test_workspace_is_enough_for_every_smaller_call() -> None:
    spec = Spec(32, 8, 128, 128, "float16")
    largest = workspace_bytes(spec, Shape(64, 1, 8, 4096), 90)
    for batch in (1, 2, 7, 33, 63, 64):
        for capacity in (1, 100, 4095, 4096):
            for kept in (1, 8):
                assert workspace_bytes(spec, Shape(batch, 77, kept, capacity), 90) <= largest


def test_mismatched_tensors_are_refused_by_name() -> None:
    tensors = to_tensors(case_inputs(BY_NAME["decode_batch"], "float32"), "float32", DEVICE)
    with pytest.raises(ChaiError, match="past_value is float32"):
        clustered_head_attention(**{**tensors, "past_value": tensors["past_value"][:, :, :-1].contiguous()})
    with pytest.raises(ChaiError, match="lengths is int64"):
        clustered_head_attention(**{**tensors, "lengths": tensors["lengths"].long()})
    strided = torch.cat([tensors["query"], tensors["query"]], dim=-1)[..., : tensors["query"].shape[3]]
    with pytest.raises(ChaiError, match="query must be contiguous"):
        clustered_head_attention(**{**tensors, "query": strided})
    with pytest.raises(ChaiError, match="workspace must be uint8"):
        clustered_head_attention(**tensors, workspace=torch.empty(8, dtype=torch.uint8, device=DEVICE))


def _blocks(
    prefill: dict[str, int] | None = None,
    score_programs: int | None = None,
    value_programs: int | None = None,
) -> Blocks:
    base = choose(Spec(8, 8, 16, 16, "float32"), 80 if DEVICE == "cuda" else INTERPRETER)
    old = base.kernels["prefill"]
    changed = KernelBlocks(old.constants | (prefill or {}), old.num_warps, old.num_stages)
    return Blocks(
        {**base.kernels, "prefill": changed},
        score_programs or base.score_programs,
        value_programs or base.value_programs,
        base.interpreted,
    )


def _check_pieces(order_and_full: np.ndarray, head_maps: np.ndarray, members: int) -> None:
    """Every head once; each full piece within one cluster; as many full pieces as the clusters allow."""
    for row, head_map in zip(order_and_full, head_maps, strict=True):
        order, full = row[:-1], int(row[-1])
        assert sorted(order.tolist()) == list(range(len(head_map)))
        pieces = head_map[order[: full * members]].reshape(full, members)
        assert (pieces == pieces[:, :1]).all()
        assert full == sum(int(count) // members for count in np.unique(head_map, return_counts=True)[1])


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
