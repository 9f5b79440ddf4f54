"""The kernels on a real GPU: all cases, CUDA graphs, no synchronisation, no allocation."""

from __future__ import annotations

import pytest
import torch

from chai_export.op.cases import CASES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DECODE = Case("graph_decode", 32, 8, 3, ((200, 1), (17, 1), (0, 1), (5, 0)), head_dim=128, capacity=256)
PREFILL = Case("graph_prefill", 32, 8, 3, ((0, 150), (40, 7), (0, 3)), head_dim=128, capacity=256)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [*CASES, DECODE, PREFILL], ids=lambda case: case.name)
def test_case_agrees_with_the_reference(case: Case, dtype: str) -> None:
    from chai_export.kernels.case_runner import run_case

    run_case(case, dtype, "cuda")


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=lambda case: case.name)
def test_a_captured_graph_follows_lengths_that_change_on_the_device(case: Case) -> None:
    from chai_export.kernels import clustered_head_attention
    from chai_export.kernels.case_runner import case_inputs, check_result, to_tensors

    inputs = case_inputs(case, "float16")
    tensors = to_tensors(inputs, "float16", "cuda")
    buffers = _outputs(tensors)
    lengths = tensors["lengths"].clone()
    tensors["lengths"].zero_()

    def call() -> None:
        clustered_head_attention(**tensors, **buffers)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    tensors["lengths"].copy_(lengths)
    graph.replay()
    torch.cuda.synchronize()
    from chai_export.kernels.launch import Result

    check_result(case, inputs, Result(*(buffers[name] for name in Result._fields)), "float16")


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=lambda case: case.name)
def test_a_call_with_all_buffers_neither_waits_nor_allocates(case: Case) -> None:
    from chai_export.kernels import clustered_head_attention
    from chai_export.kernels.case_runner import case_inputs, to_tensors

    tensors = to_tensors(case_inputs(case, "float16"), "float16", "cuda")
    buffers = _outputs(tensors)
    clustered_head_attention(**tensors, **buffers)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        clustered_head_attention(**tensors, **buffers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def _outputs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from chai_export.kernels import Shape, Spec, workspace_bytes

    query, value = tensors["query"], tensors["value"]
    batch, heads, tokens, head_dim = query.shape
    spec = Spec(heads, value.shape[1], head_dim, value.shape[3], "float16")
    shape = Shape(batch, tokens, *tensors["past_key"].shape[1:3])
    major, minor = torch.cuda.get_device_capability()
    needed = workspace_bytes(spec, shape, major * 10 + minor)
    return {
        "output": query.new_empty(batch, tokens, heads * value.shape[3]),
        "present_key": torch.empty_like(tensors["past_key"]),
        "present_value": torch.empty_like(tensors["past_value"]),
        "present_head_map": torch.empty_like(tensors["past_head_map"]),
        "workspace": torch.empty(needed, dtype=torch.uint8, device="cuda"),
    }
