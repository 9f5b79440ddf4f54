"""The whole command line of `chai-export`: one subparser a command."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from chai_export.cli import (
    bench,
    calibrate,
    chat,
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
    serve,
    verify,
)
from chai_export.cli import build as build_command
from chai_export.errors import printable
from chai_export.files import is_unicode
from chai_export.version import __version__

_COMMANDS = (
    calibrate,
    export,
    rewrite,
    build_command,
    run,
    chat,
    serve,
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


class _Parser(argparse.ArgumentParser):
    """Refuses with a line of the form that all errors have, after the usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", None, _text)

    def add_subparsers(self, **options: Any) -> Any:
        """As argparse, but what follows the command is left to the command's own parser."""
        action = super().add_subparsers(**options)
        action.type = str
        return action

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As argparse, which takes the value of ``--prompt=--`` for the end of options and gives a list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {printable(message)}\n")


def _text(argument: str) -> str:
    """An argument that is text, not a path: paths may be any bytes."""
    if not is_unicode(argument):
        raise argparse.ArgumentTypeError(f"{argument!r} is not UTF-8 text; convert it")
    return argument


def parser() -> argparse.ArgumentParser:
    """Parser whose result has ``execute``, the function that runs the chosen command."""
    root = _Parser(
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
