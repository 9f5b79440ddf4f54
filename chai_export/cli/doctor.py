"""`chai-export doctor`: what this machine can do."""

from __future__ import annotations

import argparse

from chai_export.cli.output import print_json, print_table
from chai_export.engines.doctor import diagnose

NAME = "doctor"
HELP = "Show which backends and libraries work on this machine, and how to get what is missing."
EXAMPLE = "chai-export doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def execute(arguments: argparse.Namespace) -> int:
    """Probe and show; exit 1 when no backend gives the right answer."""

    findings = diagnose()
    usable = any(finding.is_backend and finding.works for finding in findings)
    if arguments.json:
        print_json({"ok": usable, "checks": [finding.to_json() for finding in findings]})
    else:
        print_table(
            ["", "check", "found", "fix"],
            [("yes" if f.works else "no", f.name, f.found, "" if f.works else f.fix) for f in findings],
        )
    return 0 if usable else 1
