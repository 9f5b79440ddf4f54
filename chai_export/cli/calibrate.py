"""`chai-export calibrate`: the offline phase."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.bundle.atomic import atomic_file
from chai_export.cli.output import print_json, print_table
from chai_export.clustering.measure import Measure
from chai_export.errors import UsageError
from chai_export.op.probe import MEASURED_PROBE_TOKENS, PAPER_PROBE_TOKENS
from chai_export.progress import note

if TYPE_CHECKING:
    from chai_export.clustering.clusters import Clusters
    from chai_export.clustering.plan import Plan

NAME = "calibrate"
HELP = "Plan the KV cache: which heads each layer keeps and in how many bits (offline, once per model)."
EXAMPLE = (
    "chai-export calibrate ./model --text corpus.txt --loss 0.01 -o plan.json\n"
    "  chai-export calibrate ./model --text corpus.txt --from plan.json --bytes 0.4 -o smaller.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face model, or a hub id")
    parser.add_argument("--text", metavar="FILE", type=Path, action="append", help="text; may be repeated")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True,
        help="plan.json to write (clusters.json with --keep)",
    )  # fmt: skip
    parser.add_argument(
        "--loss", metavar="F", type=float,
        help="the smallest cache that raises perplexity by at most this share on unseen text (default 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--bytes", metavar="F", type=float, dest="bytes_share",
        help="the least loss in at most this share of the bytes of float16's cache with all heads",
    )  # fmt: skip
    parser.add_argument(
        "--from", metavar="PLAN", type=Path, dest="known", help="reuse the measurements of an earlier plan"
    )
    parser.add_argument(
        "--check", metavar="FILE", type=Path, help="unseen text (default: a held-out part of --text)"
    )
    parser.add_argument(
        "--force", action="store_true", help="write a plan that breaks its promise all the same, marked"
    )
    parser.add_argument(
        "--samples", metavar="N", type=int,
        help="text windows to measure on at most (default 24; 128 with --keep)",
    )  # fmt: skip
    parser.add_argument(
        "--seq-len", metavar="N", type=int, default=256, help="tokens per window (default %(default)s)"
    )
    parser.add_argument(
        "--keep", metavar="RULE",
        help="choose heads alone: elbow, budget:SHARE of KV-cache bytes saved, all, N,N,… per layer, or "
        "@clusters.json",
    )  # fmt: skip
    parser.add_argument(
        "--probe-tokens", metavar="N", type=int, default=MEASURED_PROBE_TOKENS,
        help=f"tokens that decide the head map (default %(default)s; the paper's is {PAPER_PROBE_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--measure", metavar="WHAT", default=Measure.ERROR,
        help="what --keep budget minimises: error (the curves, default) or kl (from the model, slower)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw the error curves of --keep (.png or .svg)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def execute(arguments: argparse.Namespace) -> int:
    """Calibrate, save and show the result."""
    from chai_export.clustering.clusters import Clusters

    result = _write(arguments)
    if arguments.json:
        print_json(result.to_json())
    elif isinstance(result, Clusters):
        _show_clusters(result)
    else:
        _show_plan(result)
    if not arguments.json:
        note(f"wrote {arguments.output}" + (f" and {arguments.plot}" if arguments.plot else ""))
    return 0


def _show_clusters(clusters: Clusters) -> None:
    total = clusters.num_kv_heads
    print_table(
        ["layer", "kept KV heads"],
        [(layer, f"{kept} of {total}") for layer, kept in enumerate(clusters.kept_heads)],
    )
    print(f"KV-cache bytes saved: {clusters.kv_bytes_saved:.1%}")


def _show_plan(plan: Plan) -> None:
    from chai_export.clustering.plan_text import plan_rows, plan_sentences

    print_table(["layers", "kept KV heads", "key bits", "value bits"], plan_rows(plan))
    for line in plan_sentences(plan):
        print(line)
    warning = plan.forced_warning()
    if warning is not None:
        note(f"warning: {warning}")


def _write(arguments: argparse.Namespace) -> Clusters | Plan:
    """Calibrate into the outputs; both are checked before the work, and the plan is there first."""
    from chai_export.clustering.calibrate import calibrate
    from chai_export.clustering.clusters import Clusters
    from chai_export.clustering.plan import PLAN
    from chai_export.clustering.plot import PICTURE, draw_curves, picture_format
    from chai_export.clustering.state import state_file

    keep = arguments.keep
    if arguments.plot and keep is None:
        raise UsageError("--plot draws the error curves of --keep, which a plan does not measure; see report")
    read = [arguments.model, *(arguments.text or []), arguments.check, arguments.known]
    sources = [*read, keep.removeprefix("@")] if keep is not None else read
    options: dict[str, Any] = {
        "keep": keep, "loss": arguments.loss, "bytes_share": arguments.bytes_share, "check": arguments.check,
        "known": arguments.known, "force": arguments.force,
    }  # fmt: skip
    with ExitStack() as outputs:
        if arguments.plot:
            kind = picture_format(arguments.plot)
            picture = outputs.enter_context(atomic_file(arguments.plot, PICTURE, sources=sources))
        with atomic_file(arguments.output, PLAN, sources=sources) as file:
            result: Clusters | Plan = calibrate(
                arguments.model,
                arguments.text,
                **options,
                samples=arguments.samples,
                seq_len=arguments.seq_len,
                probe_tokens=arguments.probe_tokens,
                measure=arguments.measure,
                state=state_file(arguments.output),
                trust_remote_code=arguments.trust_remote_code,
            )
            file.write_text(result.to_text(), encoding="utf-8")
        if arguments.plot and isinstance(result, Clusters):
            draw_curves(result, picture, kind)
    return result
