"""`chai-export make`: all stages of a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chai_export.cli.output import print_json, print_table
from chai_export.progress import note
from chai_export.units import bytes_text

NAME = "make"
HELP = "Run all stages of a recipe, skipping those whose inputs have not changed."
EXAMPLE = "chai-export make engines/demo.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file, such as engines/demo.yaml")


def execute(arguments: argparse.Namespace) -> int:
    """Make, then show texts, bytes and quality with all heads beside CHAI."""
    from chai_export.recipe.make import make
    from chai_export.recipe.recipe import load_recipe

    result = make(load_recipe(arguments.recipe), report=note)
    if arguments.json:
        print_json(result.to_json())
        return 0
    if "run" in result.results:
        _print_texts(result.results["run"])
    _print_figures(result.results)
    print(f"\nbundle: {result.bundle}")
    return 0


def _print_texts(run: dict[str, Any]) -> None:
    labels = {"all": "all heads", "chai": "CHAI"}
    modes = [mode for mode in labels if mode in run]
    for index, chai in enumerate(run["chai"]["results"]):
        print(f"prompt: {chai['prompt']!r}")
        for mode in modes:
            generation = run[mode]["results"][index]
            print(f"--- {labels[mode]} ({generation['stop_reason']})\n{generation['text'].strip()}")
        print()


def _print_figures(results: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = []
    if "run" in results:
        sizes = results["run"]["kv_bytes_per_token"]
        rows.append(("KV cache per token", *(bytes_text(sizes[heads]) for heads in ("all", "chai"))))
    if "eval" in results:
        rows.append(("perplexity", *(f"{results['eval'][h]['perplexity']:.3f}" for h in ("all", "chai"))))
    if "verify" in results:
        differences = results["verify"]["max_abs_logit_diff"]
        shown = ("–" if differences[h] is None else f"{differences[h]:.1e}" for h in ("all", "chai"))
        rows.append(("largest logit difference to the reference", *shown))
    if rows:
        print_table(["", "all heads", "CHAI"], rows)
    if "eval" in results:
        evaluation = results["eval"]
        print(f"same most likely token: {evaluation['top1_agreement']:.2%} of {evaluation['tokens']} tokens")
