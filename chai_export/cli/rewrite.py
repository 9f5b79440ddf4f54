"""`chai-export rewrite`: an ONNX file of another exporter becomes a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from chai_export.cli.inspect import print_bundle, print_explanation
from chai_export.cli.storage_options import add_plan_options, add_storage_options, bits_asked
from chai_export.errors import UsageError
from chai_export.op.probe import PAPER_PROBE_TOKENS

NAME = "rewrite"
HELP = "Rewrite an ONNX model of another exporter into a bundle, or explain what would match."
EXAMPLE = "chai-export rewrite ./model.onnx --plan plan.json --tokenizer ./model -o ./bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("onnx", metavar="ONNX", type=Path, help="ONNX file, or a directory that holds one")
    add_plan_options(parser)
    parser.add_argument("-o", "--output", metavar="BUNDLE", type=Path, help="directory to write")
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="Hugging Face tokenizer to put in the bundle"
    )
    parser.add_argument(
        "--probe-tokens", metavar="N", type=int,
        help="tokens that decide the head map (default: as calibrated, "
        f"{PAPER_PROBE_TOKENS} where the clusters do not say)",
    )  # fmt: skip
    add_storage_options(parser)
    parser.add_argument(
        "--explain",
        action="store_true",
        help="only print what matches, the nearest miss, and the memory and disk that the rewrite takes",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Rewrite, or explain."""
    from chai_export.clustering.plan import load_plan
    from chai_export.graph.stage import explain, rewrite

    if arguments.explain:
        chosen = None if arguments.clusters is None else load_plan(arguments.clusters)
        return print_explanation(explain(arguments.onnx, chosen), as_json=arguments.json)
    if arguments.output is None:
        raise UsageError("rewrite needs -o BUNDLE (or --explain to only look)")
    bits = bits_asked(arguments)
    bundle = rewrite(
        arguments.onnx,
        arguments.clusters,
        arguments.output,
        tokenizer=arguments.tokenizer,
        probe_tokens=arguments.probe_tokens,
        **bits,
    )
    print_bundle(bundle, as_json=arguments.json)
    return 0
