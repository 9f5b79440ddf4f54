"""What the kernels may touch: every tensor lies between guards, everything undefined is poisoned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from chai_export.kernels import Shape, Spec, clustered_head_attention, workspace_bytes
from chai_export.kernels.blocks import INTERPRETER
from chai_export.kernels.case_runner import case_inputs, check_result, to_tensors
from chai_export.op.cases import CASES, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY_NAME = {case.name: case for case in CASES}
GUARD = 512
INTEGER_POISON = 1 << 28
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class Guarded:
    """Tensors inside larger buffers whose margins hold NaN (float), a huge number (int) or 0xFF (bytes)."""

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        count = tensor.numel()
        # Margins are a multiple of 16 bytes, so that the tensor stays aligned as real ones are.
        buffer = torch.full(
            (count + 2 * GUARD,), self._poison(tensor.dtype), dtype=tensor.dtype, device=DEVICE
        )
        buffer[GUARD : GUARD + count] = tensor.flatten()
        self.buffers.append((buffer, buffer.clone(), count))
        return buffer[GUARD : GUARD + count].view(tensor.shape)

    def check(self) -> None:
        for buffer, before, count in self.buffers:
            for margin in (slice(0, GUARD), slice(GUARD + count, None)):
                assert torch.equal(buffer[margin].view(torch.uint8), before[margin].view(torch.uint8))

    @staticmethod
    def _poison(dtype: torch.dtype) -> float | int:
        if dtype.is_floating_point:
            return float("nan")
        return 255 if dtype == torch.uint8 else INTEGER_POISON


@pytest.fixture
def poisoned_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with every load of poison in the interpreter, also of one whose value is thrown away later."""
    found: list[str] = []
    original = InterpreterBuilder.create_masked_load

    def watched(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        result = original(self, ptrs, mask, *rest)
        loaded = result.data[mask.data]
        poisoned = np.isnan(loaded) if loaded.dtype.kind == "f" else loaded == INTEGER_POISON
        if poisoned.any():
            found.append(f"{int(poisoned.sum())} of {loaded.size} elements of type {loaded.dtype}")
        return result

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    return found


def _run_guarded(case: Case, inputs: dict[str, np.ndarray], dtype: str) -> tuple[Guarded, object]:
    guarded = Guarded()
    tensors = {name: guarded.place(tensor) for name, tensor in to_tensors(inputs, dtype, DEVICE).items()}
    batch, heads, tokens, head_dim = tensors["query"].shape
    value_dim, kv_heads = tensors["value"].shape[3], tensors["key"].shape[1]
    spec = Spec(heads, kv_heads, head_dim, value_dim, dtype, case.probe_tokens)
    shape = Shape(batch, tokens, *tensors["past_key"].shape[1:3])
    architecture = INTERPRETER
    if DEVICE == "cuda":
        major, minor = torch.cuda.get_device_capability()
        architecture = major * 10 + minor
    needed = workspace_bytes(spec, shape, architecture)
    workspace = guarded.place(torch.full((needed,), 255, dtype=torch.uint8, device=DEVICE))
    output = guarded.place(torch.full((batch, tokens, heads * value_dim), float("nan")).to(tensors["query"]))
    result = clustered_head_attention(
        **tensors,
        scale=case.scale,
        probe_tokens=case.probe_tokens,
        online=case.online,
        output=output,
        present_key=tensors["past_key"],
        present_value=tensors["past_value"],
        present_head_map=guarded.place(torch.full_like(tensors["past_head_map"], -3)),
        workspace=workspace,
    )
    guarded.check()
    return guarded, result


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "name", ["fills_capacity", "mixed_phases", "decode_batch", "odd_head_dim", "probe_long"]
)
def test_nothing_undefined_is_read_and_nothing_outside_the_tensors_is_written(
    name: str, dtype: str, poisoned_reads: list[str]
) -> None:
    case = BY_NAME[name]
    inputs = case_inputs(case, dtype)
    _, result = _run_guarded(case, inputs, dtype)
    check_result(case, inputs, result, dtype)
    assert not poisoned_reads


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_row_that_does_not_fit_touches_nothing_and_leaves_its_neighbours_alone(tokens: int) -> None:
    case = Case(
        "overflow", 6, 3, 2, ((9, tokens), (30 - tokens, tokens), (3, tokens)), capacity=30, tokens=tokens
    )
    inputs = case_inputs(case, "float32")
    good = clustered_head_attention(**to_tensors(inputs, "float32", DEVICE))
    for too_long in (30 - tokens + 1, 30, 1 << 30):
        inputs["past_lengths"][1] = too_long
        _, result = _run_guarded(case, inputs, "float32")
        for row in (0, 2):
            assert torch.equal(result.output[row], good.output[row])
        before = to_tensors(inputs, "float32", DEVICE)
        for name in ("key", "value"):
            untouched = getattr(result, f"present_{name}")[1].view(torch.int32)
            assert torch.equal(untouched, before[f"past_{name}"][1].view(torch.int32))


@pytest.mark.parametrize("tokens", [1, 4])
def test_an_invalid_head_map_stays_inside_the_tensors(tokens: int) -> None:
    """More KV heads than slots, and entries that are no heads: unspecified results, but no stray access."""
    case = Case("invalid_map", 6, 6, 2, ((9, tokens), (5, tokens)), tokens=tokens)
    inputs = case_inputs(case, "float32")
    inputs["past_head_map"][0] = np.arange(6)
    inputs["past_head_map"][1] = [-5, 99, 1 << 30, -(1 << 31), 5, 2]
    _run_guarded(case, inputs, "float32")


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case = BY_NAME["mixed_phases"]
    inputs = case_inputs(case, "float32")
    together = clustered_head_attention(**to_tensors(inputs, "float32", DEVICE))
    for row in (0, 2):
        single = {name: array[row : row + 1] for name, array in inputs.items()}
        alone = clustered_head_attention(**to_tensors(single, "float32", DEVICE))
        assert torch.equal(alone.output[0], together.output[row])
