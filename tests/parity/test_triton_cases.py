"""The op's cases on the Triton kernels: in the interpreter, or compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from chai_export.errors import ChaiError
from chai_export.kernels.blocks import INTERPRETER, Blocks, choose
from chai_export.kernels.case_runner import check_result, run_case, to_tensors
from chai_export.kernels.device.head_map import head_map_kernel
from chai_export.kernels.formula import evaluate
from chai_export.kernels.launch import clustered_head_attention, workspace_bytes
from chai_export.kernels.launches import build_program
from chai_export.kernels.spec import Shape, Spec
from chai_export.op.attributes import Attributes
from chai_export.op.cases import CASES, TERM_CASES, Case
from chai_export.op.head_map import cluster_heads, distances

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = (*CASES, *TERM_CASES)
BY_NAME = {case.name: case for case in ALL}

# One of each path: pages of one and of many positions, prefixes, every storage of keys and of values, terms
# on exact and on quantised caches, decode split and not. All of them run where slow tests are asked for.
IN_CI = (
    ("h8_g2_r1", "float32"),
    ("pages_of_one", "float32"),
    ("one_long_page", "float16"),
    ("shared_prefix_k8v4", "float32"),
    ("decode_batch_k8v8", "bfloat16"),
    ("decode_batch_k4v4", "float16"),
    ("odd_head_dim_k8v4", "float16"),
    ("value_dim_larger_k4v4", "float32"),
    ("mixed_phases_k16v16", "bfloat16"),
    ("mixed_phases_k0v4", "float32"),
    ("mixed_phases_everything_k8v4", "float32"),
    ("mixed_phases_everything", "float16"),
)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.parametrize(("name", "dtype"), IN_CI)
def test_case_agrees_with_the_reference(name: str, dtype: str) -> None:
    run_case(BY_NAME[name], dtype, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_every_case_agrees_with_the_reference(case: Case, dtype: str) -> None:
    if (case.name, dtype) in IN_CI:
        pytest.skip("runs in CI")
    run_case(case, dtype, DEVICE)


DECODE = Case("decode_terms", 6, 3, 2, ((19, 1), (0, 1), (7, 0), (1, 1)), sinks=True, slopes=True)


@pytest.mark.parametrize("programs", [1, 1000])
@pytest.mark.parametrize("window", [0, 5])
def test_decode_does_not_depend_on_the_number_of_splits(programs: int, window: int) -> None:
    """A fresh row among others: its only token is exact, although the cache has 4 bits."""
    attributes = Attributes(key_bits=4, value_bits=4, group=8, window=window, softcap=2.0)
    blocks = replace(_blocks(), score_programs=programs, value_programs=programs)
    run_case(replace(DECODE, page=3, attributes=attributes), "float32", DEVICE, blocks=blocks)


@pytest.mark.parametrize(("heads", "kv_heads"), [(80, 1), (6, 6)])
def test_decode_takes_many_and_single_query_heads_of_a_kv_head(heads: int, kv_heads: int) -> None:
    attributes = Attributes(key_bits=8, value_bits=4, group=16)
    case = Case("groups", heads, kv_heads, 1, ((9, 1), (0, 1)), attributes=attributes)
    run_case(case, "float32", DEVICE)


@pytest.mark.parametrize("rows", [((9, 1), (0, 1)), ((9, 2), (0, 7))])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_need_not_be_powers_of_two(rows: tuple[tuple[int, int], ...], bits: int) -> None:
    attributes = Attributes(key_bits=bits, value_bits=bits, group=12)
    run_case(Case("group_of_12", 4, 2, 1, rows, head_dim=24, attributes=attributes), "float32", DEVICE)


@pytest.mark.parametrize("members", [1, 4])
def test_prefill_does_not_depend_on_the_size_of_pieces(members: int) -> None:
    base = _blocks()
    old = base.kernels["prefill"]
    changed = replace(old, constants=old.constants | {"MEMBERS": members})
    blocks = replace(base, kernels={**base.kernels, "prefill": changed})
    run_case(BY_NAME["twins_exact_ties_k8v4"], "float32", DEVICE, blocks=blocks)


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


def test_largest_sizes_are_accepted() -> None:
    run_case(Case("largest", 128, 128, 5, ((0, 6),), capacity=8), "float32", DEVICE)
    run_case(Case("widest", 2, 2, 1, ((3, 2),), head_dim=256, capacity=8), "float32", DEVICE)


def test_a_decode_step_is_two_launches_and_no_call_needs_the_one_before() -> None:
    program = build_program(Spec(8, 2, 64, 64, "float16", key_bits=8, value_bits=8), _blocks())
    symbols = Shape(3, 1, 1, 96, 20, 32).symbols(program.spec) | {"online": 1, "window": 0}
    run = [launch.name for launch in program.launches if evaluate(launch.when, symbols)]
    assert run == ["decode_scores_kernel", "decode_values_kernel"]
    case = BY_NAME["decode_batch_k8v8"]
    workspace = torch.full((1 << 20,), 255, dtype=torch.uint8, device=DEVICE)
    for _ in range(2):  # a workspace full of rubbish, then one that a call has used
        run_case(case, "float32", DEVICE, workspace=workspace)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("entry", [-1, 1 << 20, -(1 << 31)])
def test_a_page_that_is_none_leaves_the_pools_and_other_rows_alone(tokens: int, entry: int) -> None:
    """A GPU cannot raise: the row's output is unspecified, nothing else is."""
    attributes = Attributes(key_bits=8, value_bits=4, group=8)
    case = Case("bad_page", 4, 2, 1, ((9, tokens), (11, tokens)), page=4, attributes=attributes)
    inputs = case.inputs("float32")
    good = clustered_head_attention(**to_tensors(inputs, DEVICE), attributes=attributes)
    written = inputs["page_table"][0, 2:4].copy()
    inputs["page_table"][0, 2:4] = entry
    before = to_tensors(inputs, DEVICE)
    result = clustered_head_attention(**to_tensors(inputs, DEVICE), attributes=attributes)
    assert torch.equal(result.output[1], good.output[1])
    for page in written[written >= 0]:
        if page < len(result.key_cache):
            assert torch.equal(result.key_cache[page], before["key_cache"][page])
            assert torch.equal(result.value_cache[page], before["value_cache"][page])


def test_a_row_that_does_not_fit_its_pages_is_inactive() -> None:
    case = replace(BY_NAME["shared_prefix_k8v8"], rows=((16, 3), (19, 1), (5, 4)))
    inputs = case.inputs("float32")
    inputs["past_lengths"][2] = 1 << 30
    result = clustered_head_attention(**to_tensors(inputs, DEVICE), attributes=case.attributes)
    assert not result.output[2].any()
    inputs["lengths"][2] = 0
    inputs["past_lengths"][2] = 0
    check_result(case, inputs, result, "float32")


def test_workspace_is_enough_for_every_smaller_call() -> None:
    spec = Spec(32, 8, 128, 128, "float16", key_bits=8, value_bits=4)
    largest = workspace_bytes(spec, Shape(64, 1, 8, 4096, 9999, 64), 90)
    for batch in (1, 2, 7, 33, 63, 64):
        for capacity in (64, 128, 4032, 4096):
            for kept in (1, 8):
                assert workspace_bytes(spec, Shape(batch, 77, kept, capacity, 100, 64), 90) <= largest


def test_mismatched_tensors_are_refused_by_name() -> None:
    case = BY_NAME["decode_batch_k8v4"]
    tensors = to_tensors(case.inputs("float32"), DEVICE)

    def call(**changes: torch.Tensor | None) -> None:
        clustered_head_attention(**{**tensors, **changes}, attributes=case.attributes)  # type: ignore[arg-type]

    value_cache, key_scales, table = (tensors[n] for n in ("value_cache", "key_scales", "page_table"))
    assert value_cache is not None
    assert key_scales is not None
    assert table is not None
    with pytest.raises(ChaiError, match=r"value_cache is int8 .*; it must be uint8"):
        call(value_cache=value_cache.view(torch.int8))
    with pytest.raises(ChaiError, match="key_scales is missing, but keys are stored in 8 bits"):
        call(key_scales=None)
    with pytest.raises(ChaiError, match="page_table is int64"):
        call(page_table=table.long())
    with pytest.raises(ChaiError, match="key_scales is float16"):
        call(key_scales=key_scales[..., :-1].contiguous())
    with pytest.raises(ChaiError, match="workspace must be uint8"):
        clustered_head_attention(
            **tensors,  # type: ignore[arg-type]
            attributes=case.attributes,
            workspace=torch.empty(8, dtype=torch.uint8, device=DEVICE),
        )
    with pytest.raises(ChaiError, match="GPU kernels: group must divide the head dim 20, got 8"):
        Spec(4, 2, 20, 20, "float16", key_bits=8, group_size=8)


def test_stored_bytes_are_those_of_the_specification_at_the_edges() -> None:
    """Rows of zeros, of one value, with tiny and with huge elements: codes and scales bit by bit."""
    for bits in (8, 4):
        attributes = Attributes(key_bits=bits, value_bits=bits, group=8, online=False)
        case = Case("edges", 2, 2, 2, ((3, 6), (2, 1)), attributes=attributes)
        inputs = case.inputs("float32")
        for name in ("key", "value"):
            rows = inputs[name]
            rows[0, :, 0] = 0.0
            rows[0, :, 1] = 1000.3
            rows[0, :, 2] *= np.float32(1e-7)
            rows[0, :, 3] *= np.float32(1e3)
            rows[0, :, 4] = np.arange(16) - 7.5
            rows[0, :, 5, ::2] = 0.0
        result = clustered_head_attention(**to_tensors(inputs, DEVICE), attributes=attributes)
        expected = case.reference(inputs)
        for name in ("key_cache", "value_cache", "key_scales", "value_scales"):
            actual = getattr(result, name).cpu().numpy()
            assert actual.tobytes() == getattr(expected, name).tobytes(), (bits, name)


def _blocks() -> Blocks:
    return choose(Spec(8, 8, 16, 16, "float32"), 80 if DEVICE == "cuda" else INTERPRETER)


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
