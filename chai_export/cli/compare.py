"""`chai-export compare`: ways to make the KV cache smaller at equal bytes, or clustering rules alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from chai_export.cli.output import print_json, print_table
from chai_export.errors import UsageError
from chai_export.op.probe import MEASURED_PROBE_TOKENS, PAPER_PROBE_TOKENS
from chai_export.progress import note

if TYPE_CHECKING:
    from chai_export.quality.scoreboard.run import Row, Scoreboard

NAME = "compare"
HELP = "Compare plans with other ways to make the KV cache smaller, at equal bytes (in torch, no bundle)."
EXAMPLE = "chai-export compare ./model --text heldout.txt --calibration corpus.txt --plan plan.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face model, or a hub id")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="text to measure on")
    parser.add_argument(
        "--calibration", metavar="FILE", type=Path,
        help="text that methods choose by (default: half of --text; the rest is measured)",
    )  # fmt: skip
    parser.add_argument(
        "--plan", metavar="FILE", type=Path,
        help="plan whose measurements plans are made from (default: measured first, which takes minutes)",
    )  # fmt: skip
    parser.add_argument(
        "--bytes", metavar="F", type=float, action="append",
        help="share of float16's cache for plans and for methods that can be set to any, may be repeated "
        "(default 0.2, 0.3, 0.4, 0.5, 0.6)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", metavar="A,B,…", help="methods to compare (default: all; an unknown name lists them)"
    )
    parser.add_argument("--windows", metavar="N", type=int, help="sequences to measure (default 4; rules 16)")
    parser.add_argument(
        "--seq-len", metavar="N", type=int, help="tokens per sequence (default 512; rules 256)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    rules = parser.add_argument_group("clustering rules alone, all keeping the same heads")
    rules.add_argument(
        "--keep", metavar="RULE", action="append",
        help="compare rules of clustering at heads allocated so, such as budget:0.214; may be repeated",
    )  # fmt: skip
    rules.add_argument(
        "--clusters", metavar="FILE", type=Path, help="take the error curves from this clusters.json"
    )
    rules.add_argument(
        "--probe-tokens", metavar="N,N,…",
        help=f"probe lengths to try (default {MEASURED_PROBE_TOKENS}; the paper's is {PAPER_PROBE_TOKENS})",
    )  # fmt: skip
    rules.add_argument("--seed", metavar="N", type=int, help="of random maps and K-Means (default 0)")


def execute(arguments: argparse.Namespace) -> int:
    """Compare and show one line per method."""
    if arguments.keep:
        return _rules(arguments)
    for name in ("clusters", "probe_tokens", "seed"):
        if getattr(arguments, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is for clustering rules; give --keep too, such as --keep budget:0.214")
    return _scoreboard(arguments)


def _scoreboard(arguments: argparse.Namespace) -> int:
    from chai_export.quality.scoreboard.catalogue import SHARES
    from chai_export.quality.scoreboard.run import scoreboard

    result = scoreboard(
        arguments.model,
        arguments.text,
        calibration=arguments.calibration,
        plan=arguments.plan,
        shares=arguments.bytes or SHARES,
        wanted=arguments.methods.split(",") if arguments.methods else None,
        windows=4 if arguments.windows is None else arguments.windows,
        seq_len=512 if arguments.seq_len is None else arguments.seq_len,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.json:
        print_json(result.to_json())
        return 0
    print_table(
        ["of float16", "method", "setting", "the op runs it", "perplexity", "KL", "same top token"],
        [
            (
                f"{row.bytes_share:.1%}",
                row.method,
                row.setting,
                "yes" if row.on_op else "",
                f"{row.perplexity_change:+.2%} ± {row.perplexity_error:.2%}",
                f"{row.kl:.4f}",
                f"{row.top1_agreement:.2%}",
            )
            for row in sorted(result.rows, key=lambda row: row.bytes_share)
        ],
    )
    for name, why in result.missing.items():
        note(f"{name} is not there, or not at every size: {why}")
    _judge(result)
    return 0


def _judge(result: Scoreboard) -> None:
    """Say how the plans do against what takes no more bytes than they do."""
    for each in result.at_equal_bytes():
        for what, other in (("that the op runs", each.on_op), ("of all", each.any_method)):
            if other is None:
                continue
            better = "better than" if each.plan.kl <= other.kl else "worse than"
            note(
                f"plan of {each.plan.bytes_share:.1%}: KL {each.plan.kl:.4f}, {better} the best other method "
                f"{what}, {_named(other)}"
            )
    note(f"{result.tokens} tokens in {result.windows} windows of {result.seq_len}, against the exact cache")


def _named(row: Row) -> str:
    return f"{row.method} ({row.setting}, {row.bytes_share:.1%}): {row.kl:.4f}"


def _rules(arguments: argparse.Namespace) -> int:
    from chai_export.quality.method_comparison import compare

    for name in ("plan", "bytes"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} is not for clustering rules; leave --keep out to compare plans")
    result = compare(
        arguments.model,
        arguments.text,
        calibration=arguments.calibration,
        clusters=arguments.clusters,
        keep=arguments.keep,
        methods=arguments.methods.split(",") if arguments.methods else None,
        probe_tokens=_numbers(arguments.probe_tokens or str(MEASURED_PROBE_TOKENS)),
        windows=16 if arguments.windows is None else arguments.windows,
        seq_len=256 if arguments.seq_len is None else arguments.seq_len,
        seed=arguments.seed or 0,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.json:
        print_json(result.to_json())
        return 0
    print_table(
        ["KV saved", "probe", "method", "loss change", "perplexity", "KL", "same top token"],
        [
            (
                f"{row.kv_bytes_saved:.1%}",
                row.probe_tokens,
                row.method,
                f"{row.nll_change:+.4f}",
                f"{row.perplexity_change:+.2%}",
                f"{row.kl:.4f}",
                f"{row.top1_agreement:.2%}",
            )
            for row in result.results
        ],
    )
    note(f"{result.tokens} tokens in {result.windows} windows, against all heads ({result.nll_all:.4f} nats)")
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"--probe-tokens {text}: give numbers separated by commas, such as 5,8,16") from None
