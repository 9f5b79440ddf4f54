"""GPU kernels: every case against float64, then time against torch's scaled dot product attention.

    python benchmarks/gpu.py                     # check, measure, write results/gpu-<name>.json
    python benchmarks/gpu.py --model sm_90       # no GPU: bytes, operations and ceilings of every kernel

Needs torch, Triton and NumPy. Ours includes appending the new rows; SDPA gets caches that hold them already.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import PAGE_LENGTH, Buffers, copy_bandwidth, graph_seconds, one_pool, rotations

from chai_export.kernels import Shape, Spec
from chai_export.kernels.blocks import choose
from chai_export.kernels.case_runner import run_case
from chai_export.kernels.launches import build_program
from chai_export.kernels.program import Program
from chai_export.kernels.traffic import cache_bytes, call_traffic, count_pieces
from chai_export.op.attributes import Attributes
from chai_export.op.cases import CASES, TERM_CASES, Case

RESULTS = Path(__file__).parent / "results"
EXACT = Spec(32, 32, 128, 128, "bfloat16")
SPECS = {
    "as given": EXACT,
    "8/8": replace(EXACT, key_bits=8, value_bits=8),
    "8/4": replace(EXACT, key_bits=8, value_bits=4),
}
"""By bits of keys and values."""
KEPT = 8
BATCHES = (1, 16, 64)
LENGTHS = (2048, 8192, 32768)
PREFILL = 4096
MAPS = {
    "8 clusters of 4": [head // 4 * 4 for head in range(32)],
    "25 and 7 single": [head if head < KEPT else 0 for head in range(32)],
}
ALL_HEADS = list(range(32))
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
LARGE_STEP = 300e6
SHARE_OF_COPY, OVER_SDPA, PREFILL_GAIN = 0.8, 1.4, 1.2

STORED = Attributes(key_bits=8, value_bits=4)
LARGE_CASES = (
    Case("gpu_prefill", 32, 32, 8, ((0, 700), (300, 257)), head_dim=128, page=32, capacity=768),
    Case("gpu_decode", 32, 32, 8, ((3000, 1), (777, 1), (0, 1)), head_dim=128, page=128, capacity=3072),
    Case(
        "gpu_grouped", 64, 8, 3, ((0, 300), (900, 1)), head_dim=128, page=64, capacity=1024, attributes=STORED
    ),
    Case(
        "gpu_grouped_decode", 64, 8, 3, ((2000, 1), (900, 1)), head_dim=128, page=128, capacity=2048,
        attributes=STORED,
    ),
    Case("gpu_multi_query", 128, 1, 1, ((500, 1), (129, 1)), head_dim=256, page=64, capacity=512),
    Case(
        "gpu_many_heads", 128, 128, 40, ((0, 200),), head_dim=64, page=64, capacity=256,
        attributes=Attributes(probe_tokens=8),
    ),
)  # fmt: skip
ALL_CASES = (*CASES, *TERM_CASES, *LARGE_CASES)


def check_all() -> dict[str, str]:
    """Every case in every dtype; the failures, by case and dtype."""
    failures = {}
    for case in ALL_CASES:
        for dtype in ("float32", "float16", "bfloat16"):
            try:
                run_case(case, dtype, "cuda")
            except AssertionError as error:
                failures[f"{case.name} {dtype}"] = str(error)
    print(f"cases: {3 * len(ALL_CASES) - len(failures)} passed, {len(failures)} failed")
    for name, message in failures.items():
        print(f"  FAILED {name}: {message}")
    return failures


def all_heads_bytes(length: int) -> int:
    """Of one row's keys and values with all heads in T: what SDPA reads."""
    stored = cache_bytes(EXACT, one_pool(1, 1, EXACT.num_kv_heads, length), length)
    return stored.keys + stored.values


def sdpa_seconds(batch: int, queries: int, length: int) -> dict[str, float | str]:
    """Median seconds per torch back end, or why it does not run."""
    sets = rotations(batch * all_heads_bytes(length))
    shape = (batch, EXACT.num_query_heads)

    def draw(tokens: int) -> torch.Tensor:
        return torch.randn(*shape, tokens, EXACT.head_dim, dtype=torch.bfloat16, device="cuda")

    tensors = [(draw(queries), draw(length), draw(length)) for _ in range(sets)]
    result: dict[str, float | str] = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend), torch.no_grad():
                steps = [
                    lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(
                        q, k, v, is_causal=queries > 1
                    )
                    for q, k, v in tensors
                ]
                result[name] = graph_seconds(steps)
        except RuntimeError as error:
            result[name] = str(error).splitlines()[0]
    return result


def own_seconds(
    program: Program, shape: Shape, past: int, head_map: list[int], bandwidth: float, online: bool = False
) -> dict[str, Any]:
    """Median seconds of a call and of each kernel, beside the bytes it must move."""
    traffic = call_traffic(program, shape, past, shape.tokens, head_map, online)
    moved = sum(kernel.bytes for kernel in traffic.values())
    buffers = Buffers(program, shape, past, head_map, rotations(moved))
    seconds = buffers.seconds(online=online)
    kernels = {}
    for name, kernel in traffic.items():
        alone = buffers.seconds(only=name, online=online)
        kernels[name] = {"seconds": alone, "bytes": kernel.bytes, "flops": kernel.flops}
        print(
            f"    {name:22} {alone * 1e6:9.1f} us"
            f"  {kernel.bytes / 1e6:9.2f} MB at {kernel.bytes / alone / 1e9:7.0f} GB/s"
            f"  {kernel.flops / 1e9:9.2f} GFLOP at {kernel.flops / alone / 1e12:6.1f} TFLOP/s"
        )
    return {
        "seconds": seconds,
        "bytes": moved,
        "share_of_copy": moved / seconds / bandwidth,
        "kernels": kernels,
    }


def measure_decode(architecture: int, bandwidth: float) -> list[dict[str, Any]]:
    """One token per row at every batch size, length and storage that fits in memory."""
    results = []
    for batch in BATCHES:
        for length in LENGTHS:
            if 2.5 * batch * all_heads_bytes(length) > torch.cuda.mem_get_info()[1]:
                print(f"decode B={batch} T={length}: skipped, does not fit in memory")
                continue
            entry: dict[str, Any] = {"batch": batch, "length": length, "sdpa": sdpa_seconds(batch, 1, length)}
            for bits, spec in SPECS.items():
                program = build_program(spec, choose(spec, architecture))
                for name, head_map, kept in (
                    *((n, m, KEPT) for n, m in MAPS.items()),
                    ("all heads", ALL_HEADS, 32),
                ):
                    print(f"decode B={batch} T={length} {bits} {name}")
                    gc.collect()
                    torch.cuda.empty_cache()
                    shape = one_pool(batch, 1, kept, length)
                    own = own_seconds(program, shape, length - 1, head_map, bandwidth)
                    fastest = min(
                        (s for s in entry["sdpa"].values() if isinstance(s, float)), default=math.nan
                    )
                    own["over_sdpa"] = fastest / own["seconds"]
                    if kept == KEPT and spec is EXACT and own["bytes"] > LARGE_STEP:
                        own["meets_target"] = (
                            own["share_of_copy"] >= SHARE_OF_COPY and own["over_sdpa"] >= OVER_SDPA
                        )
                    print(
                        f"  {own['seconds'] * 1e6:9.1f} us, {own['share_of_copy']:.0%} of copy bandwidth, "
                        f"{own['over_sdpa']:.2f}x the fastest SDPA {entry['sdpa']}"
                    )
                    entry[f"{bits}, {name}"] = own
            results.append(entry)
    return results


def measure_prefill(architecture: int, bandwidth: float) -> dict[str, Any]:
    """One row of S new tokens with fixed maps, with the whole online call, and with all heads."""
    entry: dict[str, Any] = {"tokens": PREFILL, "sdpa": sdpa_seconds(1, PREFILL, PREFILL)}
    runs = [(name, head_map, KEPT, False) for name, head_map in MAPS.items()]
    runs += [("all heads", ALL_HEADS, 32, False), ("online", ALL_HEADS, KEPT, True)]
    program = build_program(EXACT, choose(EXACT, architecture))
    for name, head_map, kept, online in runs:
        print(f"prefill S={PREFILL} {name}")
        shape = one_pool(1, PREFILL, kept, PREFILL)
        entry[name] = own_seconds(program, shape, 0, head_map, bandwidth, online)
    for name in MAPS:
        gain = entry["all heads"]["seconds"] / entry[name]["seconds"]
        entry[name] |= {"over_all_heads": gain, "meets_target": gain >= PREFILL_GAIN}
        print(f"  {name}: {gain:.2f}x our kernel with all heads; SDPA {entry['sdpa']}")
    return entry


def print_model(architecture: int) -> None:
    """Bytes, operations and ceilings without a GPU, as the tables of docs/performance.md."""
    print("| bits | B | T | scores, MB | values, MB | together, MB | GFLOP | gain at most |")
    print("|---|---|---|---|---|---|---|---|")
    for bits, spec in SPECS.items():
        program = build_program(spec, choose(spec, architecture))
        for batch in BATCHES:
            for length in LENGTHS:
                shape = one_pool(batch, 1, KEPT, length)
                traffic = call_traffic(program, shape, length - 1, 1, MAPS["8 clusters of 4"]).values()
                moved = [kernel.bytes for kernel in traffic]
                megabytes = " | ".join(f"{size / 1e6:.2f}" for size in (*moved, sum(moved)))
                flops = sum(kernel.flops for kernel in traffic) / 1e9
                gain = batch * all_heads_bytes(length) / sum(moved)
                print(f"| {bits} | {batch} | {length} | {megabytes} | {flops:.2f} | {gain:.2f} |")
    program = build_program(EXACT, choose(EXACT, architecture))
    members = choose(EXACT, architecture).kernels["prefill"].constants["MEMBERS"]
    print("\n| map | pieces | GFLOP | all heads / ours |\n|---|---|---|---|")
    shape, every = (one_pool(1, PREFILL, kept, PREFILL) for kept in (KEPT, 32))
    base = call_traffic(program, every, 0, PREFILL, ALL_HEADS)["prefill_kernel"].flops
    for name, head_map in {**MAPS, "all heads": ALL_HEADS}.items():
        flops = call_traffic(program, shape, 0, PREFILL, head_map)["prefill_kernel"].flops
        print(f"| {name} | {count_pieces(head_map, members)} | {flops / 1e9:.1f} | {base / flops:.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="name of the result file (default: the GPU's)")
    parser.add_argument(
        "--model", metavar="sm_NN", help="print the model of bytes for an architecture and stop"
    )
    parser.add_argument("--check-only", action="store_true", help="check the cases, measure nothing")
    arguments = parser.parse_args()
    if arguments.model:
        print_model(int(arguments.model.removeprefix("sm_")))
        return 0
    if not torch.cuda.is_available():
        print("error: no CUDA device; use --model sm_90 for the figures that need none", file=sys.stderr)
        return 1
    failures = check_all()
    if failures or arguments.check_only:
        return int(bool(failures))
    device = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    architecture = major * 10 + minor
    bandwidth = copy_bandwidth()
    print(f"{device}: copy {bandwidth / 1e12:.2f} TB/s read plus written")
    results = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_second": bandwidth,
        "cases_checked": 3 * len(ALL_CASES),
        "page_length": PAGE_LENGTH,
        "decode": measure_decode(architecture, bandwidth),
        "prefill": measure_prefill(architecture, bandwidth),
    }
    RESULTS.mkdir(exist_ok=True)
    name = arguments.name or device.lower().replace(" ", "-")
    (RESULTS / f"gpu-{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
