"""`chai-export calibrate`: the offline phase."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from chai_export.bundle.atomic import atomic_file
from chai_export.cli.output import print_json, print_table
from chai_export.clustering.measure import Measure
from chai_export.op.probe import MEASURED_PROBE_TOKENS, PAPER_PROBE_TOKENS
from chai_export.progress import note

if TYPE_CHECKING:
    from chai_export.clustering.clusters import Clusters

NAME = "calibrate"
HELP = "Find how many KV heads each layer must keep (offline, once per model)."
EXAMPLE = (
    "chai-export calibrate ./model --text corpus.txt --keep budget:0.214 -o clusters.json --plot curves.png"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face model, or a hub id")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, action="append", required=True, help="text; may be repeated"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True, help="clusters.json to write"
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, default=128, help="text windows to use (default %(default)s)"
    )
    parser.add_argument(
        "--seq-len", metavar="N", type=int, default=256, help="tokens per window (default %(default)s)"
    )
    parser.add_argument(
        "--keep", metavar="RULE", default="elbow",
        help="elbow (default), budget:SHARE of KV-cache bytes saved, all, N,N,… per layer, or @clusters.json",
    )  # fmt: skip
    parser.add_argument(
        "--probe-tokens", metavar="N", type=int, default=MEASURED_PROBE_TOKENS,
        help=f"tokens that decide the head map (default %(default)s; the paper's is {PAPER_PROBE_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--measure", metavar="WHAT", default=Measure.ERROR,
        help="what a budget minimises: error (the curves, default) or kl (from the model: slower, better)",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the error curves (.png or .svg)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def execute(arguments: argparse.Namespace) -> int:
    """Calibrate, save and show the result."""
    clusters = _write(arguments)
    if arguments.json:
        print_json(clusters.to_json())
        return 0
    total = clusters.num_kv_heads
    print_table(
        ["layer", "kept KV heads"],
        [(layer, f"{kept} of {total}") for layer, kept in enumerate(clusters.kept_heads)],
    )
    print(f"KV-cache bytes saved: {clusters.kv_bytes_saved:.1%}")
    note(f"wrote {arguments.output}" + (f" and {arguments.plot}" if arguments.plot else ""))
    return 0


def _write(arguments: argparse.Namespace) -> Clusters:
    """Calibrate into the outputs; both are checked before the work, and the clusters are there first."""
    from chai_export.clustering.calibrate import calibrate
    from chai_export.clustering.clusters import CLUSTERS
    from chai_export.clustering.plot import PICTURE, draw_curves, picture_format
    from chai_export.clustering.state import state_file

    sources = [arguments.model, *arguments.text, arguments.keep.removeprefix("@")]
    with ExitStack() as outputs:
        if arguments.plot:
            kind = picture_format(arguments.plot)
            picture = outputs.enter_context(atomic_file(arguments.plot, PICTURE, sources=sources))
        with atomic_file(arguments.output, CLUSTERS, sources=sources) as file:
            clusters = calibrate(
                arguments.model,
                arguments.text,
                keep=arguments.keep,
                samples=arguments.samples,
                seq_len=arguments.seq_len,
                probe_tokens=arguments.probe_tokens,
                measure=arguments.measure,
                state=state_file(arguments.output),
                trust_remote_code=arguments.trust_remote_code,
            )
            file.write_text(clusters.to_text(), encoding="utf-8")
        if arguments.plot:
            draw_curves(clusters, picture, kind)
    return clusters
