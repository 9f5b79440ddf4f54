"""`chai-export compare`: clustering methods side by side at equal bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

from chai_export.cli.output import print_json, print_table
from chai_export.errors import UsageError
from chai_export.op.probe import MEASURED_PROBE_TOKENS, PAPER_PROBE_TOKENS
from chai_export.progress import note

NAME = "compare"
HELP = "Compare clustering methods on a model and a text, all keeping the same heads (in torch, no bundle)."
EXAMPLE = "chai-export compare ./model --text heldout.txt --keep budget:0.214 --keep budget:0.25"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face model, or a hub id")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="text to measure on")
    parser.add_argument(
        "--calibration", metavar="FILE", type=Path,
        help="text for error curves and static maps (default: half of --text; the rest is measured)",
    )  # fmt: skip
    parser.add_argument(
        "--clusters", metavar="FILE", type=Path, help="take the error curves from this clusters.json"
    )
    parser.add_argument(
        "--keep", metavar="RULE", action="append",
        help="rule that allocates heads, may be repeated (default budget:0.214, the paper's figure)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", metavar="A,B,…", help="methods to compare (default: all; an unknown name lists them)"
    )
    parser.add_argument(
        "--probe-tokens", metavar="N,N,…", default=str(MEASURED_PROBE_TOKENS),
        help=f"probe lengths to try (default %(default)s; the paper's is {PAPER_PROBE_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--windows", metavar="N", type=int, default=16, help="sequences to measure (default %(default)s)"
    )
    parser.add_argument(
        "--seq-len", metavar="N", type=int, default=256, help="tokens per sequence (default %(default)s)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of random maps and K-Means (default %(default)s)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def execute(arguments: argparse.Namespace) -> int:
    """Compare and show one line per method."""
    from chai_export.quality.method_comparison import PAPER_BUDGET, compare

    result = compare(
        arguments.model,
        arguments.text,
        calibration=arguments.calibration,
        clusters=arguments.clusters,
        keep=arguments.keep or (PAPER_BUDGET,),
        methods=arguments.methods.split(",") if arguments.methods else None,
        probe_tokens=_numbers(arguments.probe_tokens),
        windows=arguments.windows,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
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
