"""Measure block sizes on this GPU and write the fastest as a table of chai_export/kernels/blocks.json.

    python benchmarks/gpu_tune.py --dtype bfloat16 --heads 32 --kv-heads 32 --kept 8 --dim 128

Prefill and the two decode kernels are tuned one after the other, each with the other's choice fixed. The new
rule goes into a table named after the architecture, which starts as a copy of the one used so far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import Buffers, one_pool, rotations

from chai_export.kernels import Shape, Spec
from chai_export.kernels.blocks import BLOCKS_FILE, Blocks, KernelBlocks, choose, padded
from chai_export.kernels.launches import build_program
from chai_export.kernels.traffic import cache_bytes

PREFILL_TOKENS = 4096
DECODE_BATCH, DECODE_LENGTH = 16, 8192
PROGRAMS_PER_PROCESSOR = (2, 4, 8)


def prefill_candidates() -> Iterator[KernelBlocks]:
    """Block sizes worth a try; those that do not fit in shared memory drop out when compiling."""
    for m, n, members, warps, stages in itertools.product(
        (64, 128), (32, 64, 128), (1, 2, 4), (4, 8), (2, 3)
    ):
        if m * members <= 32 * warps:
            yield KernelBlocks({"BLOCK_M": m, "BLOCK_N": n, "MEMBERS": members}, warps, stages)


def decode_candidates(processors: int) -> Iterator[tuple[KernelBlocks, int]]:
    """Tile, warps and stages of both decode kernels, and programs per launch."""
    for tile, warps, stages in itertools.product((32, 64, 128), (2, 4), (2, 3, 4)):
        for programs in PROGRAMS_PER_PROCESSOR:
            yield KernelBlocks({"BLOCK_N": tile}, warps, stages), programs * processors


def seconds(spec: Spec, blocks: Blocks, shape: Shape, past: int, head_map: list[int]) -> float:
    """Time of a call with a choice, infinite if it does not fit on this GPU."""
    program = build_program(spec, blocks)
    sets = rotations(shape.batch * cache_bytes(spec, shape, past + shape.tokens).together)
    try:
        return Buffers(program, shape, past, head_map, sets).seconds()
    except OutOfResources:
        return float("inf")


def with_decode(blocks: Blocks, kernel: KernelBlocks, programs: int) -> Blocks:
    """A choice with other decode kernels; values run with as many programs as scores."""
    merged = blocks.kernels["decode_values"].constants  # BLOCK_SPLITS
    values = KernelBlocks(merged, kernel.num_warps, kernel.num_stages)
    kernels = {**blocks.kernels, "decode_scores": kernel, "decode_values": values}
    return replace(blocks, kernels=kernels, score_programs=programs, value_programs=programs)


def tune(spec: Spec, kept: int, blocks: Blocks) -> Blocks:
    """The fastest choice found, clusters as even as the numbers allow."""
    group = spec.group
    kept_of = [head // group * kept // spec.num_kv_heads for head in range(spec.num_query_heads)]
    first = {slot: kept_of.index(slot) for slot in kept_of}
    head_map = [first[slot] for slot in kept_of]
    shape = one_pool(1, PREFILL_TOKENS, kept, PREFILL_TOKENS)
    best = seconds(spec, blocks, shape, 0, head_map)
    for kernel in prefill_candidates():
        tried = replace(blocks, kernels={**blocks.kernels, "prefill": kernel})
        time = seconds(spec, tried, shape, 0, head_map)
        print(f"prefill {kernel}: {time * 1e6:.1f} us")
        if time < best:
            best, blocks = time, tried
    shape = one_pool(DECODE_BATCH, 1, kept, DECODE_LENGTH)
    best = seconds(spec, blocks, shape, DECODE_LENGTH - 1, head_map)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for kernel, programs in decode_candidates(processors):
        tried = with_decode(blocks, kernel, programs)
        time = seconds(spec, tried, shape, DECODE_LENGTH - 1, head_map)
        print(f"decode {kernel} {programs} programs: {time * 1e6:.1f} us")
        if time < best:
            best, blocks = time, tried
    return blocks


def write(spec: Spec, architecture: int, blocks: Blocks) -> None:
    """Put the choice into the architecture's own table."""
    content: dict[str, Any] = json.loads(BLOCKS_FILE.read_text())
    entry = content["architectures"][str(architecture)]
    table = f"sm_{architecture}"
    rules = content["tables"].setdefault(table, list(content["tables"][entry["table"]]))
    dim = max(padded(spec.head_dim), padded(spec.value_head_dim))
    kernels = {
        name: kernel.constants | {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
        for name, kernel in blocks.kernels.items()
    }
    rule = {"item_bytes": [spec.item_bytes], "max_dim": dim, "kernels": kernels}
    rules[:] = [r for r in rules if (r["item_bytes"], r["max_dim"]) != (rule["item_bytes"], dim)]
    rules.append(rule)
    rules.sort(key=lambda r: (r["item_bytes"], r["max_dim"]))  # the first that fits counts
    targets = {"score_programs": blocks.score_programs, "value_programs": blocks.value_programs}
    content["architectures"][str(architecture)] = {"table": table, **targets}
    BLOCKS_FILE.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--kept", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device; tuning measures on one", file=sys.stderr)
        return 1
    spec = Spec(arguments.heads, arguments.kv_heads, arguments.dim, arguments.dim, arguments.dtype)
    major, minor = torch.cuda.get_device_capability()
    write(spec, major * 10 + minor, tune(spec, arguments.kept, choose(spec, major * 10 + minor)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
