"""`chai-export report`: one page about a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from chai_export.bundle.choices import Backend
from chai_export.cli.output import print_json
from chai_export.progress import note

NAME = "report"
HELP = "Write one self-contained HTML page: curves, head maps, memory, quality."
EXAMPLE = "chai-export report ./bundle -o report.html --reference ./model --compare compare.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the page to write")
    parser.add_argument(
        "--reference", metavar="MODEL",
        help="the Hugging Face model: adds how its heads correlate, and its texts beside the bundle's",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[],
        help="show head maps, and with --reference texts, for it; may be repeated",
    )  # fmt: skip
    parser.add_argument("--eval", metavar="FILE", type=Path, help="output of `eval --json`")
    parser.add_argument("--verify", metavar="FILE", type=Path, help="output of `verify --json`")
    parser.add_argument(
        "--compare",
        metavar="FILE",
        type=Path,
        help="output of `compare --json`: adds what other methods cost",
    )
    parser.add_argument(
        "--backend", metavar="NAME", default=Backend.ONNXRUNTIME, help="(default %(default)s)"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Write the page; with --json also print what it shows."""
    from chai_export.report.stage import report

    data = report(
        arguments.bundle,
        arguments.output,
        reference=arguments.reference,
        prompts=arguments.prompt,
        evaluation=arguments.eval,
        verification=arguments.verify,
        comparison=arguments.compare,
        backend=arguments.backend,
    )
    if arguments.json:
        print_json(data)
    if data["plan"] is not None and data["plan"]["warning"] is not None:
        note(f"warning: {data['plan']['warning']}")
    note(f"wrote {arguments.output} ({arguments.output.stat().st_size / 1024:.0f} KiB)")
    return 0
