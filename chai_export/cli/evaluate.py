"""`chai-export eval`: what clustering costs on a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from chai_export.cli.output import print_json, print_table

NAME = "eval"
HELP = "Perplexity with all heads and with CHAI, and how often they agree, on a text."
EXAMPLE = "chai-export eval ./bundle --text heldout.txt --max-tokens 8192"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, required=True, help="text the model was not trained on"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, help="stop after so many tokens (default: the whole text)"
    )
    parser.add_argument(
        "--window", metavar="N", type=int, default=512, help="tokens per window (default %(default)s)"
    )
    parser.add_argument("--backend", metavar="NAME", default="onnxruntime", help="(default %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    """Evaluate and show both ways side by side."""
    from chai_export.quality.evaluate import evaluate

    result = evaluate(
        arguments.bundle,
        arguments.text,
        backend=arguments.backend,
        max_tokens=arguments.max_tokens,
        window=arguments.window,
    )
    if arguments.json:
        print_json(result)
        return 0
    print_table(
        ["heads", "nll per token", "perplexity"],
        [
            (heads, f"{result[heads]['nll']:.4f}", f"{result[heads]['perplexity']:.3f}")
            for heads in ("all", "chai")
        ],
    )
    agreement = f"same most likely token: {result['top1_agreement']:.2%}; KL: {result['kl']:.4f} nats"
    print(f"{result['tokens']} tokens; {agreement}")
    return 0
