"""The whole command line of `chai-export`: one subparser a command."""

from __future__ import annotations

import argparse

from chai_export.cli import (
    bench,
    calibrate,
    compare,
    doctor,
    evaluate,
    export,
    inspect,
    make,
    package,
    report,
    rewrite,
    run,
    verify,
)
from chai_export.cli import build as build_command
from chai_export.version import __version__

_COMMANDS = (
    calibrate,
    export,
    rewrite,
    build_command,
    run,
    verify,
    evaluate,
    compare,
    report,
    inspect,
    bench,
    package,
    make,
    doctor,
)


def parser() -> argparse.ArgumentParser:
    """Parser whose result has ``execute``, the function that runs the chosen command."""
    root = argparse.ArgumentParser(
        prog="chai-export",
        description="Compile decoder-only language models for Clustered Head Attention (CHAI).",
        epilog="`chai-export COMMAND --help` shows a command's options and an example.",
    )
    root.add_argument("--version", action="version", version=f"chai-export {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        command.set_defaults(execute=module.execute)
    return root
