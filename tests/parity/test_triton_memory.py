"""What the kernels may touch: tensors lie between guards, everything undefined is poisoned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from chai_export.kernels.case_runner import check_result, to_tensors
from chai_export.kernels.launch import Result, clustered_head_attention
from chai_export.op.cases import CASES, TERM_CASES, Case

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
BY_NAME = {case.name: case for case in (*CASES, *TERM_CASES)}
GUARD = 512
INTEGER_POISON = 1 << 28
WORKSPACE = 1 << 21


class Guarded:
    """Tensors inside larger buffers whose margins hold NaN (float), a huge number (int32) or 0xA5 (codes)."""

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        count = tensor.numel()
        buffer = torch.empty(count + 2 * GUARD, dtype=tensor.dtype)
        if tensor.is_floating_point():
            buffer.fill_(float("nan"))
        elif tensor.dtype == torch.int32:
            buffer.fill_(INTEGER_POISON)
        else:
            buffer.view(torch.uint8).fill_(0xA5)
        buffer[GUARD : GUARD + count] = tensor.flatten()
        self.buffers.append((buffer, buffer.clone(), count))
        return buffer[GUARD : GUARD + count].view(tensor.shape)

    def check(self) -> None:
        for buffer, before, count in self.buffers:
            for margin in (slice(0, GUARD), slice(GUARD + count, None)):
                assert torch.equal(buffer[margin].view(torch.uint8), before[margin].view(torch.uint8))


@pytest.fixture
def poisoned_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with every load of poison in the interpreter, also of one whose value is thrown away later."""
    found: list[str] = []
    original = InterpreterBuilder.create_masked_load

    def watched(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        result = original(self, ptrs, mask, *rest)
        loaded = result.data[mask.data]
        # Entries of the page table that the case took out are -1 and 1 << 20.
        poisoned = (
            np.isnan(loaded) if loaded.dtype.kind == "f" else np.isin(loaded, (INTEGER_POISON, 1 << 20))
        )
        if poisoned.any():
            found.append(f"{int(poisoned.sum())} of {loaded.size} elements of type {loaded.dtype}")
        return result

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    return found


def run_guarded(case: Case, inputs: dict[str, Any]) -> Result:
    guarded = Guarded()
    tensors = {
        name: None if tensor is None else guarded.place(tensor)
        for name, tensor in to_tensors(inputs, "cpu").items()
    }
    query, value = tensors["query"], tensors["value"]
    assert query is not None
    assert value is not None
    batch, heads, tokens, _ = query.shape
    output = torch.full((batch, tokens, heads * value.shape[3]), float("nan"), dtype=query.dtype)
    arguments: dict[str, Any] = {
        **tensors,
        "output": guarded.place(output),
        "present_head_map": guarded.place(torch.full((batch, heads), -3, dtype=torch.int32)),
        "workspace": guarded.place(torch.full((WORKSPACE,), 255, dtype=torch.uint8)),
    }
    result = clustered_head_attention(**arguments, attributes=case.attributes)
    guarded.check()
    return result


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("decode_batch_k8v4", "float16"),
        ("shared_prefix_k4v4", "float32"),
        ("mixed_phases_window", "float32"),
        ("mixed_phases_everything_k8v4", "float16"),
        ("odd_head_dim_k8v8", "float32"),
    ],
)
def test_nothing_undefined_is_read_and_nothing_outside_the_tensors_is_written(
    name: str, dtype: str, poisoned_reads: list[str]
) -> None:
    case = BY_NAME[name]
    inputs = case.inputs(dtype)
    result = run_guarded(case, inputs)
    check_result(case, inputs, result, dtype)
    assert not poisoned_reads


@pytest.mark.parametrize("tokens", [1, 4])
def test_an_invalid_head_map_stays_inside_the_tensors(tokens: int) -> None:
    """More KV heads than slots, and entries that are no heads: unspecified results, but no stray access."""
    case = Case("invalid_map", 6, 6, 2, ((9, tokens), (5, tokens)), tokens=tokens)
    inputs = case.inputs("float32")
    inputs["past_head_map"][0] = np.arange(6)
    inputs["past_head_map"][1] = [-5, 99, 1 << 30, -(1 << 31), 5, 2]
    run_guarded(case, inputs)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case = BY_NAME["mixed_phases_k8v8"]
    inputs = case.inputs("float32")
    together = run_guarded(case, inputs)
    of_rows = ("query", "key", "value", "page_table", "past_head_map", "past_lengths", "lengths")
    for row in (0, 2):
        single = {n: array[row : row + 1] if n in of_rows else array for n, array in inputs.items()}
        assert torch.equal(run_guarded(case, single).output[0], together.output[row])
