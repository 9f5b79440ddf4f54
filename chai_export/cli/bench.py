"""`chai-export bench`: speed and bytes, CHAI against all heads and against the peers installed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chai_export.arguments import require_at_least_one
from chai_export.bench.phase import Phase
from chai_export.cli.output import print_json, print_table
from chai_export.errors import UsageError
from chai_export.progress import note
from chai_export.units import bytes_text

NAME = "bench"
HELP = "Measure the op alone, a bundle's generation, or its memory."
EXAMPLE = "chai-export bench attention --phase decode --length 8192 --kept 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command: one subparser for each thing to measure."""
    what = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    _add_attention(what)
    _add_generate(what)
    _add_memory(what)


def execute(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    measure, show = arguments.measure
    result = measure(arguments)
    if arguments.json:
        print_json(result)
    else:
        show(result)
    return 0


def _subparser(subparsers: Any, name: str, help_: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_,
        description=help_,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
    )
    return command


def _add_attention(subparsers: Any) -> None:
    command = _subparser(
        subparsers,
        "attention",
        "The op alone, against GroupQueryAttention in any precision, Attention-23 and torch.",
        EXAMPLE,
    )
    command.add_argument("--phase", choices=Phase.words(), help="(default: both)")
    command.add_argument("--length", metavar="T", type=int, action="append", help="tokens; may be repeated")
    command.add_argument("--batch", metavar="B", type=int, action="append", help="rows; may be repeated")
    command.add_argument(
        "--heads", metavar="H", type=int, default=32, help="query heads (default %(default)s)"
    )
    command.add_argument("--kv-heads", metavar="G", type=int, help="KV heads (default: as many)")
    command.add_argument("--kept", metavar="R", type=int, help="KV heads kept (default: a quarter)")
    command.add_argument("--head-dim", metavar="D", type=int, default=128, help="(default %(default)s)")
    command.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    for what in ("key", "value"):
        command.add_argument(
            f"--{what}-bits", type=int, choices=[16, 8, 4], default=0, help=f"of {what}s (default: --dtype)"
        )
    command.add_argument("--threads", metavar="N", type=int, help="(default: all cores)")
    command.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        default=1.0,
        help="for each implementation of a case (default 1)",
    )
    command.set_defaults(measure=(_attention, _show_attention))


def _attention(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from chai_export.bench.attention import bench_attention, default_cases

    require_at_least_one(
        length=min(arguments.length or [1]),
        batch=min(arguments.batch or [1]),
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        kept=arguments.kept,
        head_dim=arguments.head_dim,
    )
    if arguments.seconds < 0:
        raise UsageError(f"--seconds is {arguments.seconds:g}; give 0 or more")
    shape_flags = ("phase", "length", "batch", "kv_heads", "kept")
    plain = arguments.heads == 32 and arguments.key_bits == arguments.value_bits == 0
    if plain and all(getattr(arguments, flag) is None for flag in shape_flags):
        cases = default_cases(dtype=arguments.dtype, head_dim=arguments.head_dim)
    else:
        cases = _cases(arguments)
    return bench_attention(cases, threads=arguments.threads, min_seconds=arguments.seconds)


def _cases(arguments: argparse.Namespace) -> list[Any]:
    from chai_export.bench.problem import Shape

    heads = arguments.heads
    kv_heads = arguments.kv_heads if arguments.kv_heads is not None else heads
    kept = arguments.kept if arguments.kept is not None else max(1, kv_heads // 4)
    if heads % kv_heads or kept > kv_heads:
        raise UsageError(
            f"--heads {heads} --kv-heads {kv_heads} --kept {kept} do not fit; heads must be a multiple of "
            "kv-heads, and kept at most kv-heads"
        )
    phases = [Phase(arguments.phase)] if arguments.phase else list(Phase)
    return [
        Shape(
            phase, batch, heads, kv_heads, kept, arguments.head_dim, length, arguments.dtype,
            arguments.key_bits, arguments.value_bits,
        )
        for phase in phases
        for batch in arguments.batch or [1]
        for length in arguments.length or [2048]
    ]  # fmt: skip


def _show_attention(result: Mapping[str, Any]) -> None:
    print_table(
        ["phase", "B", "H/G/R", "bits", "T", "chai ms", "fastest peer", "ms", "gain", "ceiling", "GB/s"],
        [_attention_row(case) for case in result["cases"] if "chai_ms" in case],
    )
    note(f"memory reads at {result['read_bandwidth_gb_s']:.1f} GB/s; threads: {result['threads']}")
    for case in result["cases"]:
        for name, reason in case["skipped"].items():
            note(f"skipped: {name} at {case['phase']} B={case['B']} T={case['T']}: {reason}")


def _attention_row(case: Mapping[str, Any]) -> list[str]:
    best, spread = case["best_peer"], case["spread"]
    return [
        case["phase"],
        str(case["B"]),
        f"{case['H']}/{case['G']}/{case['R']}",
        "/".join(str(bits) if bits else case["dtype"] for bits in (case["key_bits"], case["value_bits"])),
        str(case["T"]),
        f"{case['chai_ms']:.2f} ±{spread['chai']:.0%}",
        best,
        f"{case['peers_ms'][best]:.2f} ±{spread[best]:.0%}",
        f"{case['speedup_vs_best_peer']:.2f}x",
        f"{case['ceiling']:.2f}x",
        f"{case['bandwidth_gb_s']:.1f}" if "bandwidth_gb_s" in case else "",
    ]


def _add_bundle_arguments(command: argparse.ArgumentParser, new_tokens: int) -> None:
    command.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    command.add_argument("--prompt-tokens", metavar="N", type=int, default=1024, help="(default %(default)s)")
    command.add_argument(
        "--new-tokens", metavar="N", type=int, default=new_tokens, help="(default %(default)s)"
    )


def _add_generate(subparsers: Any) -> None:
    command = _subparser(
        subparsers,
        "generate",
        "Time to the first token and per token of a bundle.",
        "chai-export bench generate ./bundle --prompt-tokens 4096 --model ./model",
    )
    _add_bundle_arguments(command, new_tokens=32)
    command.add_argument(
        "--rounds", metavar="N", type=int, default=3, help="prompts timed (default %(default)s)"
    )
    command.add_argument(
        "--model", metavar="DIR", type=Path, help="the bundle's model, to measure onnxruntime-genai on it too"
    )
    command.add_argument(
        "--against", metavar="BUNDLE", type=Path,
        help="another bundle of the model, such as one with an exact cache, to measure with all heads",
    )  # fmt: skip
    command.add_argument("--threads", metavar="N", type=int, help="(default: all cores)")
    command.set_defaults(measure=(_generate, _show_generate))


def _generate(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from chai_export.bench.generate import bench_generate

    return bench_generate(
        arguments.bundle,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        model=arguments.model,
        against=arguments.against,
        threads=arguments.threads,
    )


def _show_generate(result: Mapping[str, Any]) -> None:
    print_table(
        ["", "first token, ms", "each further token, ms"],
        [
            (
                name,
                f"{result['ttft_ms'][name]:.1f} ± {result['ttft_spread'][name]:.0%}",
                f"{result['tpot_ms'][name]:.2f} ± {result['tpot_spread'][name]:.0%}",
            )
            for name in result["tpot_ms"]
        ],
    )
    note(
        f"gain over the fastest peer: {result['ttft_speedup_vs_best_peer']:.2f}x to the first token, "
        f"{result['tpot_speedup_vs_best_peer']:.2f}x per token (bytes allow {result['ceiling']:.2f}x)"
    )
    for name, reason in result["skipped"].items():
        note(f"skipped: {name}: {reason}")


def _add_memory(subparsers: Any) -> None:
    command = _subparser(
        subparsers,
        "memory",
        "Bytes of caches and peak resident size of a bundle.",
        "chai-export bench memory ./bundle --prompt-tokens 4096",
    )
    _add_bundle_arguments(command, new_tokens=8)
    command.set_defaults(measure=(_memory, _show_memory))


def _memory(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from chai_export.bench.memory import bench_memory

    return bench_memory(
        arguments.bundle, prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens
    )


def _show_memory(result: Mapping[str, Any]) -> None:
    print_table(
        ["heads", "KV caches", "peak resident", "of that, loading"],
        [
            (
                mode,
                bytes_text(figures["kv_cache_bytes"]),
                bytes_text(figures["peak_resident_bytes"]),
                bytes_text(figures["peak_resident_bytes_when_loaded"]),
            )
            for mode, figures in result["heads"].items()
        ],
    )
    stored, float16 = result["kv_bytes_per_token"], result["kv_bytes_per_token_float16"]
    note(f"a token takes {bytes_text(stored)}, {stored / float16:.1%} of all heads in float16")
