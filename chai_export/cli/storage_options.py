"""`--plan`, `--key-bits` and `--value-bits`, of the commands that write bundles."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.errors import UsageError
from chai_export.op.precision import SAFE_BITS
from chai_export.progress import note

if TYPE_CHECKING:
    from chai_export.bundle.bundle import Bundle
    from chai_export.clustering.plan import Chosen

_CHOICES = (16, 8, 4, 0)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What the bundle is made with."""
    plan = parser.add_mutually_exclusive_group()
    plan.add_argument(
        "--plan", metavar="FILE", type=Path, dest="clusters",
        help="plan.json or clusters.json from `chai-export calibrate` (default: every head, in 8 bits)",
    )  # fmt: skip
    plan.add_argument("--clusters", metavar="FILE", type=Path, help="the same")


def bits_asked(arguments: argparse.Namespace) -> dict[str, int | None]:
    """Bits that override the plan, or stand in for one. A forced plan is warned of.

    Raises:
        ChaiError: the file is missing or malformed.
    """
    from chai_export.clustering.plan import Plan, load_plan

    chosen: Chosen | None = None if arguments.clusters is None else load_plan(arguments.clusters)
    warn_of(chosen)
    safe = None if isinstance(chosen, Plan) else SAFE_BITS
    bits = {"key_bits": arguments.key_bits, "value_bits": arguments.value_bits}
    return {name: safe if given is None else given for name, given in bits.items()}


def warn_of(chosen: Chosen | None) -> None:
    """Say so if it is a plan that was forced."""
    from chai_export.clustering.plan import Plan

    warning = chosen.forced_warning() if isinstance(chosen, Plan) else None
    if warning is not None:
        note(f"warning: {warning}")


def warn_of_bundle(bundle: Bundle) -> None:
    """Say so if the bundle was made with a plan that was forced.

    Raises:
        ChaiError: its plan is malformed.
    """
    from chai_export.bundle.bundle import PLAN_FILE
    from chai_export.clustering.plan import Plan

    if PLAN_FILE in bundle.manifest.files:
        warn_of(Plan.load(bundle.clusters_path))


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """What the matrices of the bundle are stored in."""
    parser.add_argument(
        "--weights", choices=("int4", "int8"),
        help="store matrices in blocks of 4- or 8-bit codes (default: in --dtype)",
    )  # fmt: skip
    parser.add_argument(
        "--weight-block", type=int, choices=(32, 128), metavar="N",
        help="with --weights: codes that share a scale, 32 or 128 (default 32)",
    )  # fmt: skip
    parser.add_argument(
        "--weight-method", choices=("rtn", "hqq"),
        help="with --weights: nearest codes, or Half-Quadratic Quantization (default rtn)",
    )  # fmt: skip
    parser.add_argument(
        "--float-head",
        action="store_true",
        help="with --weights, leave the head in --dtype (default: 8 bits)",
    )


def weights_asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``export`` for what :func:`add_weight_options` added.

    Raises:
        UsageError: an option of quantised weights is given, and --weights is not.
    """
    asked = {"weight_block": arguments.weight_block, "weight_method": arguments.weight_method}
    given = {name: value for name, value in asked.items() if value is not None}
    if arguments.weights is None and (given or arguments.float_head):
        flag = f"--{next(iter(given), 'float_head').replace('_', '-')}"
        raise UsageError(f"{flag} is for quantised weights; give --weights int4 or int8 too")
    return {"weights": arguments.weights, **given, "quantise_head": not arguments.float_head}


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """What the caches of the bundle are stored in."""
    for what in ("key", "value"):
        parser.add_argument(
            f"--{what}-bits", type=int, choices=_CHOICES,
            help=f"of cached {what}s: float16, 8 or 4 bits with scales, 0 for the model's dtype (default: as "
            "planned, 8 without a plan)",
        )  # fmt: skip
