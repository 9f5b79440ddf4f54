"""`chai-export export`: a Hugging Face model becomes a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chai_export.bundle.choices import Membership
from chai_export.cli.inspect import print_bundle
from chai_export.cli.storage_options import (
    add_plan_options,
    add_storage_options,
    add_weight_options,
    bits_asked,
    weights_asked,
)
from chai_export.op.dtypes import Dtype
from chai_export.op.probe import PAPER_PROBE_TOKENS
from chai_export.progress import note

NAME = "export"
HELP = "Export a Hugging Face model, rewrite its attention and write a bundle."
EXAMPLE = "chai-export export ./model --plan plan.json -o ./bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face model, or a hub id")
    add_plan_options(parser)
    parser.add_argument(
        "-o", "--output", metavar="BUNDLE", type=Path, required=True, help="directory to write"
    )
    parser.add_argument(
        "--dtype", choices=Dtype.words(), default=Dtype.FLOAT32,
        help="of weights and caches (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--probe-tokens", metavar="N", type=int,
        help="tokens that decide the head map (default: as calibrated, "
        f"{PAPER_PROBE_TOKENS} where the clusters do not say)",
    )  # fmt: skip
    add_storage_options(parser)
    parser.add_argument(
        "--membership", choices=Membership.words(), default=Membership.ONLINE,
        help="head maps from each sequence, or fixed now, with unused projections cut away",
    )  # fmt: skip
    add_weight_options(parser)
    parser.add_argument("--text", metavar="FILE", type=Path, help="calibration text for --membership static")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def execute(arguments: argparse.Namespace) -> int:
    """Export, rewrite, prove and write."""
    from chai_export.exporter.stage import export

    asked: dict[str, Any] = {**bits_asked(arguments), **weights_asked(arguments)}
    bundle = export(
        arguments.model,
        arguments.clusters,
        arguments.output,
        dtype=arguments.dtype,
        probe_tokens=arguments.probe_tokens,
        **asked,
        membership=arguments.membership,
        text=arguments.text,
        trust_remote_code=arguments.trust_remote_code,
    )
    print_bundle(bundle, as_json=arguments.json)
    static = bundle.manifest.static
    if static is not None:
        share = static.parameters_saved / static.parameters_before
        note(
            f"static membership: {static.parameters_saved} parameters ({share:.1%}) and "
            f"{static.flops_saved_per_token} operations per token cut away"
        )
    return 0
