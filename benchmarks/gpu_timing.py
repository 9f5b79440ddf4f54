"""Timing on a GPU: one call per rotating buffer set, captured in a CUDA graph, median of replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from chai_export.kernels.launch import run
from chai_export.kernels.program import Program
from chai_export.kernels.spec import Shape

REPLAYS = 30
WARM_UP = 5
CACHE_FACTOR = 3
"""Buffers rotate over this many times the L2 cache, so that no step finds its data there."""


def rotations(step_bytes: int) -> int:
    """How many buffer sets are needed for a step that reads this many bytes."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-CACHE_FACTOR * cache // max(step_bytes, 1)))


def graph_seconds(steps: Sequence[Callable[[], Any]]) -> float:
    """Median seconds of one step; ``steps`` do the same on different buffers."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for replay in range(WARM_UP + REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= WARM_UP:
            times.append(begin.elapsed_time(end) / 1e3 / len(steps))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy of 1 GiB."""
    source = torch.randint(0, 1 << 30, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / graph_seconds([lambda: target.copy_(source)])


class Buffers:
    """Rotating tensors of one shape; every row has ``past`` cached and S new tokens, and the same map."""

    def __init__(self, program: Program, shape: Shape, past: int, head_map: Sequence[int], sets: int) -> None:
        spec = program.spec
        dtype = getattr(torch, spec.dtype)
        batch, tokens, kept, capacity = shape.batch, shape.tokens, shape.kept, shape.capacity
        heads, kv_heads = spec.num_query_heads, spec.num_kv_heads

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, dtype=dtype, device="cuda")

        def integers(values: Sequence[int], *size: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda").expand(size).contiguous()

        self.program, self.shape = program, shape
        self.scale = spec.head_dim**-0.5
        self.workspace = torch.empty(program.workspace_bytes(shape), dtype=torch.uint8, device="cuda")
        self.sets = [
            {
                "query": draw(batch, heads, tokens, spec.head_dim),
                "key": draw(batch, kv_heads, tokens, spec.head_dim),
                "value": draw(batch, kv_heads, tokens, spec.value_head_dim),
                "present_key": draw(batch, kept, capacity, spec.head_dim),
                "present_value": draw(batch, kv_heads, capacity, spec.value_head_dim),
                "output": draw(batch, tokens, heads * spec.value_head_dim),
                "past_head_map": integers(list(head_map), batch, heads),
                "present_head_map": integers([0], batch, heads),
                "past_lengths": integers([past], batch),
                "lengths": integers([tokens], batch),
            }
            for _ in range(sets)
        ]

    def seconds(self, only: str = "", online: bool = False) -> float:
        """Median seconds of a call, or of one of its kernels (whose workspace a whole call has filled)."""

        def step(tensors: dict[str, torch.Tensor], name: str) -> Callable[[], None]:
            return lambda: run(
                self.program, self.shape, tensors, self.workspace, scale=self.scale, online=online, only=name
            )

        for tensors in self.sets:
            step(tensors, "")()
        return graph_seconds([step(tensors, only) for tensors in self.sets])
