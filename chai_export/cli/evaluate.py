"""`chai-export eval`: what clustering costs on a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from chai_export.cli.output import print_json, print_table

NAME = "eval"
HELP = "Perplexity and agreement on a text, or scores on lm-eval tasks, with all heads and with CHAI."
EXAMPLE = "chai-export eval ./bundle --text heldout.txt --max-tokens 8192"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", type=Path, help="text the model was not trained on")
    what.add_argument(
        "--tasks", metavar="A,B,…",
        help="lm-eval tasks; the paper's are piqa,hellaswag,arc_challenge,arc_easy,boolq",
    )  # fmt: skip
    parser.add_argument(
        "--task-path", metavar="DIR", type=Path, help="folder with task files of your own, for --tasks"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="examples of each task (default: all)")
    parser.add_argument(
        "--reference", metavar="MODEL", help="the Hugging Face model, for --tasks with --backend torch"
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
    if arguments.tasks:
        return _tasks(arguments)
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


def _tasks(arguments: argparse.Namespace) -> int:
    from chai_export.quality.lm_eval_tasks import evaluate_tasks

    result = evaluate_tasks(
        arguments.bundle,
        arguments.tasks.split(","),
        backend=arguments.backend,
        task_path=arguments.task_path,
        limit=arguments.limit,
        reference=arguments.reference,
    )
    if arguments.json:
        print_json(result)
        return 0
    print_table(
        ["task", "metric", "all heads", "chai"],
        [
            (task, metric, f"{value:.4f}", f"{by_heads['chai'][metric]:.4f}")
            for task, by_heads in result["tasks"].items()
            for metric, value in by_heads.get("all", {}).items()
        ],
    )
    return 0
