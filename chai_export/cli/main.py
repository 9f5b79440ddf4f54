"""`chai-export`: parse the command line, call one stage, print its result."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import chai_export
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
from chai_export.errors import ChaiError, UsageError

DEBUG_VARIABLE = "CHAI_EXPORT_DEBUG"

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
    """The whole command line, one subparser a command."""
    root = argparse.ArgumentParser(
        prog="chai-export",
        description="Compile decoder-only language models for Clustered Head Attention (CHAI).",
        epilog="`chai-export COMMAND --help` shows a command's options and an example.",
    )
    root.add_argument("--version", action="version", version=f"chai-export {chai_export.__version__}")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 on failure, 2 on wrong usage, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    _quiet_libraries()
    try:
        code: int = arguments.execute(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        code, message = _explain(error)
        print("error:", " ".join(message.split()), file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and the one line that a user reads."""
    if isinstance(error, ChaiError):
        return (2 if isinstance(error, UsageError) else 1), str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; finished stages are kept, run the same command again to go on"
    if isinstance(error, MemoryError):
        return 1, "out of memory; use a smaller --samples, --seq-len or --max-seq, or a machine with more"
    if isinstance(error, OSError):
        cause = f"{error.filename or 'input/output'}: {error.strerror or error}"
        return 1, f"{cause}; check the path, its permissions and the free space"
    details = f"set {DEBUG_VARIABLE}=1 to see where, and report it"
    return 1, f"unexpected {type(error).__name__}: {error}; {details}"


def _quiet_libraries() -> None:
    """Keep progress and advice of the libraries below off the user's screen; ours goes to stderr."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get(DEBUG_VARIABLE):
        warnings.simplefilter("ignore")
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
