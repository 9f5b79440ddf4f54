"""docs/performance.md and its plots from results/{attention,paged-attention,generate,startup}-*.json.

python benchmarks/performance_page.py [--results DIR] [--docs DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).parents[1]
Row = dict[str, Any]


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(columns)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def attention_table(cases: list[Row]) -> str:
    def row(case: Row) -> list[str]:
        best = case["best_peer"]
        spread = max(case["spread"][best], case["spread"]["chai"])
        bandwidth = f"{case['bandwidth_gb_s']:.1f}" if "bandwidth_gb_s" in case else ""
        return [
            f"{case['phase']}, {case['dtype']}",
            *(str(case[name]) for name in "BHGRT"),
            bits_of(case),
            f"{case['chai_ms']:.2f}",
            f"{best} {case['peers_ms'][best]:.2f}",
            f"{case['speedup_vs_best_peer']:.2f}",
            f"{case['ceiling']:.2f}",
            f"{spread:.0%}",
            bandwidth,
        ]

    columns = ("phase", *"BHGRT", "bits", "CHAI, ms", "fastest peer, ms", "gain", "ceiling", "spread", "GB/s")
    return table(columns, (row(case) for case in cases if "chai_ms" in case))


def bits_of(case: Row) -> str:
    """Storage of CHAI's keys and values; older results have none but the dtype's."""
    own = int(case["dtype"].removeprefix("float"))
    return "/".join(str(case.get(name) or own) for name in ("key_bits", "value_bits"))


def skipped_lines(cases: list[Row]) -> str:
    def line(case: Row, name: str, reason: str) -> str:
        heads = f"H/G/R={case['H']}/{case['G']}/{case['R']}"
        return f"- {name}, {case['phase']} B={case['B']} {heads} T={case['T']}: {reason}"

    lines = [line(case, *item) for case in cases for item in case["skipped"].items()]
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def spread_text(spread: float) -> str:
    return f"± {spread:.0%}" if spread else "(once)"


def generate_table(results: list[Row]) -> str:
    def row(result: Row) -> list[str]:
        first, each = (
            ", ".join(
                f"{name} {milliseconds:.1f} {spread_text(result[f'{kind}_spread'][name])}"
                for name, milliseconds in result[f"{kind}_ms"].items()
            )
            for kind in ("ttft", "tpot")
        )
        gain = result["tpot_speedup_vs_best_peer"]
        return [
            result["pattern"],
            result.get("cache", "exact"),
            str(result["prompt_tokens"]),
            first,
            each,
            f"{result['ttft_speedup_vs_best_peer']:.2f}",
            f"{gain:.3f}",
            f"{result['ceiling']:.3f}",
        ]

    columns = (
        "clusters",
        "cache",
        "prompt",
        "first token, ms",
        "each further token, ms",
        "gain, first",
        "gain, each",
    )
    return table((*columns, "bytes allow"), map(row, results))


def plot_gains(cases: list[Row], path: Path) -> None:
    """Gain over the fastest peer, case by case, with the ceiling as a mark."""
    shown = [case for case in cases if "chai_ms" in case and case["ceiling"] > 1]
    labels = [
        f"{case['phase']} {case['H']}/{case['G']}/{case['R']}\n{bits_of(case)} B={case['B']} T={case['T']}"
        for case in shown
    ]
    figure, axes = plt.subplots(figsize=(max(6.0, 0.62 * len(shown)), 4.2), layout="constrained")
    axes.bar(range(len(shown)), [case["speedup_vs_best_peer"] for case in shown], color="#4878a8")
    axes.plot(
        range(len(shown)), [case["ceiling"] for case in shown], "k_", markersize=18, label="ceiling by bytes"
    )
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    axes.set_xticks(range(len(shown)), labels, rotation=90, fontsize=7)
    axes.set_ylabel("times as fast as the fastest peer")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def section(kind: str, path: Path, images: Path) -> str:
    name = path.stem.removeprefix(f"{kind}-")
    result = json.loads(path.read_text(encoding="utf-8"))
    if kind == "attention":
        return op_section(name, result, images)
    return {"paged-attention": paged_section, "generate": generate_section, "startup": startup_section}[kind](
        name, result
    )


def generate_section(name: str, results: list[Row]) -> str:
    return f"""## Whole model on {name}

{machine_line(results[0])}
A random Llama of 24 layers, 16 heads (MHA) and 370 M parameters, float32; `python benchmarks/generate.py`.
Gains are over the faster of our own all heads and onnxruntime-genai; the last column is what the bytes
read per token (weights and caches) allow.

{generate_table(results)}"""


def op_section(name: str, result: Row, images: Path) -> str:
    plot_gains(result["cases"], images / f"attention-{name}.png")
    return f"""## The op on {name}

{machine_line(result)} Memory reads at {result["read_bandwidth_gb_s"]:.1f} GB/s.
`python benchmarks/attention.py`; D = 128; times are medians of interleaved runs, *spread* is half the
distance of their quartiles, *GB/s* counts the cache bytes that decoding must read. In all cases:

{summary(result["cases"])}

![Gains](images/attention-{name}.png)

{attention_table(result["cases"])}

{GQA}

{skipped_lines(result["cases"])}"""


def paged_section(name: str, result: Row) -> str:
    cases = result["cases"]
    kinds = [kind for kind in cases[0]["ms"] if "_kept_" not in kind]
    fewer = list(dict.fromkeys(kind.rpartition("_")[0] for kind in cases[0]["ms"] if "_kept_" in kind))

    def cell(case: Row, kind: str) -> str:
        gain = case["times_as_fast_as_float32_all_heads"].get(kind)
        return "" if gain is None else f"{gain:.2f}"

    def row(case: Row) -> list[str]:
        sizes = [str(case[size]) for size in "BHGRT"]
        kept = [cell(case, f"{kind}_{case['R']}") for kind in fewer]
        return [*sizes, *(cell(case, kind) for kind in kinds), *kept]

    columns = ("B", "H", "G", "R", "T", *map(column_of, kinds), *(f"{column_of(kind)}, R" for kind in fewer))
    return f"""## Decode on caches in pages on {name}

{machine_line(result)} Memory reads at {result["read_bandwidth_gb_s"]:.1f} GB/s.
`python benchmarks/paged_attention.py`; pages of {cases[0]["page"]} positions in random order, D = 128. How
many times as fast as our own float32 with all heads; bits are of keys/values, *R*: R KV heads keep keys.

{table(columns, map(row, cases))}"""


def column_of(kind: str) -> str:
    """paged_8_4_all_heads is "8/4"; peers keep their names."""
    if not kind.startswith("paged_"):
        return kind
    keys, values = kind.split("_")[1:3]
    return f"{keys}/{values}"


def startup_section(name: str, result: Row) -> str:
    machine = result["machine"]
    rows = (
        (command, f"{times['warm_s']:.2f}", f"{times['cold_s']:.2f}")
        for command, times in result["commands"].items()
    )
    return f"""## Start of the commands on {name}

{machine["date"]}, {machine["processor"]}, {machine["cores"]} cores. `python benchmarks/startup.py`; the demo
model's bundle, seconds to the first byte of output, of `run` to its first token.

{table(("command", "files warm", "files cold"), rows)}"""


def machine_line(result: Row) -> str:
    machine = result["machine"]
    versions = f"ONNX Runtime {machine['onnxruntime']}, torch {machine['torch']}"
    if "onnxruntime_genai" in machine:
        versions += f", onnxruntime-genai {machine['onnxruntime_genai']}"
    where = f"{machine['processor']}, {machine['cores']} cores, {result['threads']} threads"
    return f"{machine['date']}, {where}, {versions}."


def summary(cases: list[Row]) -> str:
    """What the worst case of each kind reaches."""
    lines = []
    kinds = {
        (case["phase"], bits_of(case), case["R"] < case["G"]): None for case in cases if "chai_ms" in case
    }
    for phase, bits, fewer in kinds:
        gains = [
            (case["speedup_vs_best_peer"], case["speedup_vs_best_peer"] / case["ceiling"])
            for case in cases
            if "chai_ms" in case
            and (case["phase"], bits_of(case), case["R"] < case["G"]) == (phase, bits, fewer)
        ]
        least, share = (min(column) for column in zip(*gains, strict=True))
        label = "fewer KV heads kept" if fewer else "all KV heads kept"
        ceiling = f", at least {share:.2f} of the ceiling" if fewer else ""
        lines.append(f"- {phase}, {bits} bits, {label}: {least:.2f} times the fastest peer or more{ceiling}")
    return "\n".join(lines)


GQA = """Decoding with grouped queries is bound by arithmetic, not by memory: four query heads use each row,
three of them from L1, which one core does at 16 GB/s (`benchmarks/native/read_order.cpp`)."""

INTRODUCTION = """# Performance

Made by `python benchmarks/performance_page.py` from `benchmarks/results/`; do not edit. Peers: ONNX Runtime's
GroupQueryAttention with a shared cache buffer (ort_gqa), the same on caches in float16, int8 and 4 bits
(ort_gqa_float16, ort_gqa_int8, ort_gqa_int4), Attention of ONNX opset 23 (ort_attention), torch's
scaled_dot_product_attention (torch_sdpa), this op with all KV heads kept (chai_all_heads; where caches have
fewer bits also chai_float32_all_heads). The ceiling is the bytes of cache that all heads read in the dtype
over those that CHAI reads: 2G / (R + G) where it stores the same. Results of milan-2 are of the kernel before
caches lay in pages. What was tried on the way is in `benchmarks/experiments.md`."""


NO_CPU_RESULT = """## CPU

No timing of a quiet machine is in `benchmarks/results/` yet, so this page claims none. `python
benchmarks/attention.py NAME` and `python benchmarks/generate.py NAME` make them;
`benchmarks/experiments.md` has what was seen while the kernels were written."""

GPU = """## GPU

**No GPU has run these kernels yet, so there is no measured figure for one.** `python benchmarks/gpu.py`
measures on a machine that has one. What follows is computed, not measured: the bytes and operations of a
decode step, by kernel, and the gain over all heads in bfloat16 that the bytes allow. H = G = 32, D = 128, R
= 8, keys and values in bfloat16, in 8 bits, and in 8 and 4; made by `python benchmarks/gpu.py --model
sm_90`. More, prefill and the compiler's registers among it, is in [kernels.md](kernels.md)."""


def gpu_section() -> str:
    """The byte model of the GPU kernels, as the GPU benchmark prints it."""
    script = REPOSITORY / "benchmarks" / "gpu.py"
    model = subprocess.run(
        [sys.executable, str(script), "--model", "sm_90"], capture_output=True, text=True, check=True
    )
    return f"{GPU}\n\n{model.stdout.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs")
    arguments = parser.parse_args()
    images = arguments.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    kinds = ("attention", "paged-attention", "generate", "startup")
    files = [(kind, path) for kind in kinds for path in sorted(arguments.results.glob(f"{kind}-*.json"))]
    cpu = [section(kind, path, images) for kind, path in files] or [NO_CPU_RESULT]
    page = "\n\n".join([INTRODUCTION, *cpu, gpu_section()])
    (arguments.docs / "performance.md").write_text(page.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
