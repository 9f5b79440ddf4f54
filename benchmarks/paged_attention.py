"""Decode on caches in pages and in 32, 8 and 4 bits, into benchmarks/results/paged-attention-<name>.json.

    python benchmarks/paged_attention.py NAME [--threads N] [--seconds S] [--length T …] [--batch B …]

Version 2 of the op against version 1 on one contiguous cache and against ONNX Runtime's GroupQueryAttention
with float32, int8 and 4-bit caches, all in one interleaved run. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from chai_export.bench import machine
from chai_export.bench.op_session import OpSession
from chai_export.bench.paged_op import PagedOp
from chai_export.bench.peers import SkippedError, bound_node, group_query_attention
from chai_export.bench.phase import Phase
from chai_export.bench.problem import Problem, Shape
from chai_export.bench.timing import interleaved
from chai_export.op.v2.attributes import Attributes
from chai_export.op.v2.storage import Storage
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, ONNXRUNTIME_LIBRARY_V2, find_library

PAGE = 64
HEADS, KEPT, DIM = 32, 8, 128
FORMS = {"paged_32_32": (0, 0), "paged_8_8": (8, 8), "paged_8_4": (8, 4), "paged_4_4": (4, 4)}
BASELINE = "contiguous_32_all_heads"


def contiguous(problem: Problem, kept: int, threads: int) -> Callable[[], Any]:
    """Version 1."""
    library = find_library(ONNXRUNTIME_LIBRARY)
    assert library is not None, "the native library is not installed"
    session = OpSession({"scale": 0.0, "probe_tokens": 5, "online": 1}, "float32", library, threads=threads)
    return session.bind(problem.op_inputs(kept), in_place=True).run


def paged(problem: Problem, kept: int, bits: tuple[int, int], threads: int) -> Callable[[], Any]:
    """Version 2 on the same rows, in pages that lie in random order."""
    library = find_library(ONNXRUNTIME_LIBRARY_V2)
    assert library is not None, "the native library is not installed"
    case = problem.case
    attributes = Attributes(key_bits=bits[0], value_bits=bits[1])
    inputs = problem.op_inputs(kept)
    entries = -(-case.length // PAGE)
    table = np.random.default_rng(1).permutation(case.batch * entries).astype(np.int32)
    table = table.reshape(case.batch, entries)
    feeds = {
        name: inputs[name] for name in ("query", "key", "value", "past_head_map", "past_lengths", "lengths")
    }
    feeds["page_table"] = table
    for name, cache, stored in (("key", "past_key", bits[0]), ("value", "past_value", bits[1])):
        storage = Storage(stored, case.head_dim, attributes.group)
        feeds |= _pool(name, inputs[cache], storage, table)
    session = PagedOp(attributes, "float32", library, threads=threads)
    return session.bind(feeds, in_place=True).run


def _pool(name: str, cache: np.ndarray, storage: Storage, table: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [B, heads, T, D] as the pool of pages that the table says, one head at a time."""
    batch, heads, length, _ = cache.shape
    pages, entries = table.size, table.shape[1]
    padded = entries * PAGE
    pool = {f"{name}_cache": np.zeros((pages, heads, PAGE, storage.columns), storage.dtype(cache.dtype))}
    if storage.quantised:
        pool[f"{name}_scales"] = np.zeros((pages, heads, PAGE, storage.scale_columns), np.float16)
    for b in range(batch):
        for head in range(heads):
            rows = np.zeros((padded, cache.shape[3]), cache.dtype)
            rows[:length] = cache[b, head]
            stored, scales = storage.store(rows)
            pool[f"{name}_cache"][table[b], head] = stored.reshape(entries, PAGE, -1)
            if scales is not None:
                pool[f"{name}_scales"][table[b], head] = scales.reshape(entries, PAGE, -1)
    return pool


def quantised_group_query(problem: Problem, bits: int, threads: int) -> Callable[[], Any]:
    """ONNX Runtime's GroupQueryAttention on int8 or 4-bit caches, one scale per channel."""
    case = problem.case
    rng = np.random.default_rng(2)
    shape = (case.batch, case.kv_heads, case.length, case.head_dim * bits // 8)
    caches = [rng.integers(0, 255, shape, dtype=np.uint8) for _ in range(2)]
    if bits == 8:
        caches = [cache.view(np.int8) for cache in caches]
    packed = [
        array.transpose(0, 2, 1, 3).reshape(case.batch, case.tokens, -1)
        for array in (problem.query, problem.key, problem.value)
    ]
    scale = np.full((case.kv_heads, 1, case.head_dim), 0.01, np.float32)
    inputs = {
        "query": packed[0],
        "key": packed[1],
        "value": packed[2],
        "past_key": caches[0],
        "past_value": caches[1],
        "seqlens_k": np.full(case.batch, case.length - 1, np.int32),
        "total_sequence_length": np.array([case.length], np.int32),
        "k_scale": scale,
        "v_scale": scale.copy(),
    }
    names = list(inputs)
    node = helper.make_node(
        "GroupQueryAttention",
        [*names[:7], "", "", "", "", "", *names[7:]],
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=bits,
    )
    outputs = {"output": np.empty_like(packed[0]), "present_key": caches[0], "present_value": caches[1]}
    return bound_node(node, inputs, outputs, threads, opset=18)


def measure(batch: int, length: int, threads: int, seconds: float) -> dict[str, Any]:
    """One case: all implementations in turn."""
    case = Shape(Phase.DECODE, batch, HEADS, HEADS, KEPT, DIM, length)
    problem = Problem(case)
    runs: dict[str, Callable[[], Any]] = {BASELINE: contiguous(problem, HEADS, threads)}
    for name, bits in FORMS.items():
        runs[f"{name}_all_heads"] = paged(problem, HEADS, bits, threads)
    for name in ("paged_32_32", "paged_8_8", "paged_8_4"):
        runs[f"{name}_kept_{KEPT}"] = paged(problem, KEPT, FORMS[name], threads)
    skipped = {}
    peers: dict[str, Callable[[], Callable[[], Any]]] = {
        "ort_gqa": lambda: group_query_attention(problem, threads),
        "ort_gqa_int8": lambda: quantised_group_query(problem, 8, threads),
        "ort_gqa_int4": lambda: quantised_group_query(problem, 4, threads),
    }
    for name, build in peers.items():
        try:
            runs[name] = build()
            runs[name]()
        except (SkippedError, RuntimeError) as error:
            runs.pop(name, None)
            skipped[name] = str(error)[:200]
    timings = interleaved(runs, min_seconds=seconds)
    base = timings[BASELINE].median
    return {
        "B": batch,
        "H": HEADS,
        "G": HEADS,
        "D": DIM,
        "T": length,
        "page": PAGE,
        "ms": {name: round(timing.median, 3) for name, timing in timings.items()},
        "spread": {name: round(timing.spread, 3) for name, timing in timings.items()},
        "times_as_fast_as_float32_all_heads": {
            name: round(base / timing.median, 3) for name, timing in timings.items()
        },
        "skipped": skipped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--length", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    machine.let_idle_threads_sleep()
    bandwidth = machine.read_bandwidth(arguments.threads)
    cases = []
    for batch in arguments.batch:
        for length in arguments.length:
            if batch * length > 1 << 17:  # more memory than the machines this runs on have
                continue
            cases.append(measure(batch, length, arguments.threads, arguments.seconds))
            print(json.dumps(cases[-1]["times_as_fast_as_float32_all_heads"]))
            gc.collect()
    result = {
        "machine": machine.describe(),
        "threads": arguments.threads,
        "read_bandwidth_gb_s": bandwidth,
        "cases": cases,
    }
    path = Path(__file__).parent / "results" / f"paged-attention-{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
