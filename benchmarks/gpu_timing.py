"""Timing on a GPU: one call per rotating buffer set, captured in a CUDA graph, median of replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from chai_export.kernels.launches import tensor_types
from chai_export.kernels.program import Program
from chai_export.kernels.run import TORCH_DTYPES, run_launches
from chai_export.kernels.spec import Shape

PAGE_LENGTH = 128
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
    """Rotating tensors of one shape; every row has ``past`` cached and S new tokens, and the same map.

    Rows hold pages of the pool in random order.
    """

    def __init__(self, program: Program, shape: Shape, past: int, head_map: Sequence[int], sets: int) -> None:
        spec = program.spec
        batch, tokens = shape.batch, shape.tokens
        heads, kv_heads = spec.num_query_heads, spec.num_kv_heads
        of_keys, of_values = ((shape.pages, n, shape.page_length) for n in (shape.kept, kv_heads))
        shapes = {
            "query": (batch, heads, tokens, spec.head_dim),
            "key": (batch, kv_heads, tokens, spec.head_dim),
            "value": (batch, kv_heads, tokens, spec.value_head_dim),
            "key_cache": (*of_keys, spec.storage_k.columns),
            "value_cache": (*of_values, spec.storage_v.columns),
            "key_scales": (*of_keys, spec.storage_k.scale_columns),
            "value_scales": (*of_values, spec.storage_v.scale_columns),
            "output": (batch, tokens, heads * spec.value_head_dim),
        }
        types = tensor_types(spec)

        def draw(name: str) -> torch.Tensor:
            dtype = TORCH_DTYPES[types[name]]
            if dtype.is_floating_point:
                return torch.randn(shapes[name], dtype=dtype, device="cuda").abs_()
            return torch.randint(0, 127, shapes[name], dtype=dtype, device="cuda")

        def integers(values: Sequence[int], *size: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda").expand(size).contiguous()

        def table() -> torch.Tensor:
            pages = torch.randperm(shape.pages, dtype=torch.int32, device="cuda")
            return pages[: batch * shape.row_pages].view(batch, shape.row_pages)

        self.program, self.shape = program, shape
        self.scale = spec.head_dim**-0.5
        self.workspace = torch.empty(program.workspace_bytes(shape), dtype=torch.uint8, device="cuda")
        self.sets = [
            {
                **{name: draw(name) for name in shapes if name in types},
                "page_table": table(),
                "past_head_map": integers(list(head_map), batch, heads),
                "present_head_map": integers([0], batch, heads),
                "past_lengths": integers([past], batch),
                "lengths": integers([tokens], batch),
            }
            for _ in range(sets)
        ]

    def seconds(self, only: str = "", online: bool = False) -> float:
        """Median seconds of a call, or of one of its kernels (whose workspace a whole call has filled)."""
        symbols = self.shape.symbols(self.program.spec) | {"online": int(online), "window": 0}
        floats = {"scale": self.scale, "softcap": 0.0}

        def step(tensors: dict[str, torch.Tensor], name: str) -> Callable[[], None]:
            return lambda: run_launches(self.program, symbols, tensors, self.workspace, floats, name)

        for tensors in self.sets:
            step(tensors, "")()
        return graph_seconds([step(tensors, only) for tensors in self.sets])


def one_pool(batch: int, tokens: int, kept: int, length: int) -> Shape:
    """B rows of ``length`` tokens, S of them new, in a pool that holds just their pages."""
    row_pages = -(-length // PAGE_LENGTH)
    return Shape(batch, tokens, kept, row_pages * PAGE_LENGTH, batch * row_pages, PAGE_LENGTH)
