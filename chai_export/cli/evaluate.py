"""`chai-export eval`: what clustering costs on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chai_export.bundle.choices import Backend
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
        "--reference", metavar="MODEL",
        help="the Hugging Face model: computes all heads instead of the bundle (static membership needs it), "
        "and with --tasks --backend torch both sides",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, help="stop after so many tokens (default: the whole text)"
    )
    parser.add_argument(
        "--window", metavar="N", type=int, default=512, help="tokens per window (default %(default)s)"
    )
    parser.add_argument(
        "--prompts", metavar="N", type=int, default=4,
        help="starts of windows to continue greedily with both, 0 for none (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--new-tokens",
        metavar="N",
        type=int,
        default=32,
        help="tokens to make for each (default %(default)s)",
    )
    parser.add_argument(
        "--backend", metavar="NAME", default=Backend.ONNXRUNTIME, help="(default %(default)s)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


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
        prompts=arguments.prompts,
        new_tokens=arguments.new_tokens,
        reference=arguments.reference,
        trust_remote_code=arguments.trust_remote_code,
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
    print(f"{result['tokens']} tokens; {agreement}\n")
    print_table(
        ["position", "predictions", "KL, nats"],
        [(_range(part), part["tokens"], f"{part['kl']:.4f}") for part in result["kl_by_position"]],
    )
    for line in _texts(result["divergence"]):
        print(line)
    return 0


def _range(part: dict[str, Any]) -> str:
    return str(part["first"]) if part["first"] == part["last"] else f"{part['first']}-{part['last']}"


def _texts(texts: list[dict[str, Any]]) -> list[str]:
    """Where greedy texts part, as sentences; nothing when none were made."""
    if not texts:
        return []
    differ = [text for text in texts if text["first_difference"] is not None]
    lines = [f"\ngreedy texts: {len(texts) - len(differ)} of {len(texts)} are those of all heads to the end"]
    lines += [
        f"  another leaves them at token {text['first_difference']} of {text['new_tokens']}"
        for text in differ
    ]
    return lines


def _tasks(arguments: argparse.Namespace) -> int:
    from chai_export.quality.lm_eval_tasks import evaluate_tasks

    result = evaluate_tasks(
        arguments.bundle,
        arguments.tasks.split(","),
        backend=arguments.backend,
        task_path=arguments.task_path,
        limit=arguments.limit,
        reference=arguments.reference,
        trust_remote_code=arguments.trust_remote_code,
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
