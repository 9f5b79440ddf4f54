"""`--key-bits` and `--value-bits`, of the commands that write bundles."""

from __future__ import annotations

import argparse

_CHOICES = (16, 8, 4)


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """What the caches of the bundle are stored in."""
    for what in ("key", "value"):
        parser.add_argument(
            f"--{what}-bits", type=int, choices=_CHOICES,
            help=f"of cached {what}s: float16, or 8 or 4 bits with scales (default: the model's dtype)",
        )  # fmt: skip
