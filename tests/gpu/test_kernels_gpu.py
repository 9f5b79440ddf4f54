"""The kernels on a real GPU: all cases, CUDA graphs, no synchronisation, no allocation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chai_export.op.attributes import Attributes
from chai_export.op.cases import CASES, TERM_CASES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STORED = Attributes(key_bits=8, value_bits=4, softcap=20.0)
DECODE = Case(
    "graph_decode_v2", 32, 8, 3, ((200, 1), (17, 1), (0, 1), (5, 0)), head_dim=128, page=32, capacity=256,
    sinks=True, attributes=STORED,
)  # fmt: skip
PREFILL = Case(
    "graph_prefill_v2", 32, 8, 3, ((0, 150), (40, 7), (0, 3)), head_dim=128, page=32, capacity=256,
    sinks=True, attributes=STORED,
)  # fmt: skip
# Many splits of one row: the last of them to arrive merges.
LONG = Case("long_decode_v2", 8, 8, 2, ((6000, 1),), head_dim=64, page=64, capacity=6400, attributes=STORED)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [*CASES, *TERM_CASES, DECODE, PREFILL, LONG], ids=lambda case: case.name)
def test_case_agrees_with_the_reference(case: Case, dtype: str) -> None:
    from chai_export.kernels.case_runner import run_case

    run_case(case, dtype, "cuda")


@pytest.mark.parametrize("case", [DECODE, PREFILL, LONG], ids=lambda case: case.name)
def test_a_captured_graph_is_replayed_many_times_on_one_workspace(case: Case) -> None:
    """Counters start anew in each replay, lengths change on the device."""
    from chai_export.kernels.case_runner import check_result, to_tensors
    from chai_export.kernels.launch import Result, clustered_head_attention

    inputs = case.inputs("float16")
    tensors = to_tensors(inputs, "cuda")
    buffers = _outputs(case, tensors)
    lengths = tensors["lengths"]
    assert lengths is not None
    wanted = lengths.clone()
    lengths.zero_()

    def call() -> None:
        clustered_head_attention(**tensors, **buffers, attributes=case.attributes)  # type: ignore[arg-type]

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    lengths.copy_(wanted)
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    caches = [tensors[name] for name in ("key_cache", "value_cache", "key_scales", "value_scales")]
    result = Result(buffers["output"], *caches, buffers["present_head_map"])  # type: ignore[arg-type]
    check_result(case, inputs, result, "float16")


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=lambda case: case.name)
def test_a_call_with_all_buffers_neither_waits_nor_allocates(case: Case) -> None:
    from chai_export.kernels.case_runner import to_tensors
    from chai_export.kernels.launch import clustered_head_attention

    tensors = to_tensors(case.inputs("float16"), "cuda")
    arguments: dict[str, Any] = {**tensors, **_outputs(case, tensors), "attributes": case.attributes}
    clustered_head_attention(**arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        clustered_head_attention(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def _outputs(case: Case, tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    from chai_export.kernels.launch import workspace_bytes
    from chai_export.kernels.spec import Shape, Spec

    query, value, cache, table = (tensors[n] for n in ("query", "value", "key_cache", "page_table"))
    assert query is not None
    assert value is not None
    assert cache is not None
    assert table is not None
    batch, heads, tokens, head_dim = query.shape
    stored = case.attributes
    spec = Spec(
        heads, value.shape[1], head_dim, value.shape[3], "float16", stored.probe_tokens,
        key_bits=stored.key_bits, value_bits=stored.value_bits, group_size=stored.group,
        softcap=stored.softcap > 0, sinks=case.sinks, slopes=case.slopes,
    )  # fmt: skip
    pages, kept, length = cache.shape[:3]
    shape = Shape(batch, tokens, kept, table.shape[1] * length, pages, length)
    major, minor = torch.cuda.get_device_capability()
    needed = workspace_bytes(spec, shape, major * 10 + minor)
    head_map = tensors["past_head_map"]
    assert head_map is not None
    return {
        "output": query.new_empty(batch, tokens, heads * value.shape[3]),
        "present_head_map": torch.empty_like(head_map),
        "workspace": torch.empty(needed, dtype=torch.uint8, device="cuda"),
    }
