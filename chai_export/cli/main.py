"""`chai-export`: parse the command line, call one stage, print its result."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from chai_export.cli import signals
from chai_export.errors import ChaiError, UsageError

DEBUG_VARIABLE = "CHAI_EXPORT_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 on failure, 2 on wrong usage, 128 + n after signal n."""
    with signals.unwinding() as received:
        try:
            return _run(argv)
        except (Exception, KeyboardInterrupt) as error:
            signals.ignore()
            if os.environ.get(DEBUG_VARIABLE):
                import traceback

                traceback.print_exc()
            code, message = _explain(signals.Interrupted(received[0]) if received else error)
            print("error:", " ".join(message.split()), file=sys.stderr)
            return code


def _run(argv: Sequence[str] | None) -> int:
    from chai_export.cli.parser import parser

    arguments = parser().parse_args(argv)
    _quiet_libraries()
    try:
        code: int = arguments.execute(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and the one line that a user reads."""
    if isinstance(error, ChaiError):
        return (2 if isinstance(error, UsageError) else 1), str(error)
    if isinstance(error, KeyboardInterrupt):
        by = f" by {error}" if isinstance(error, signals.Interrupted) else ""
        again = "finished stages are kept, run the same command again to go on"
        return signals.exit_code(error), f"interrupted{by}; {again}"
    if isinstance(error, MemoryError):
        return 1, "out of memory; use a smaller --samples, --seq-len or --max-seq, or a machine with more"
    if isinstance(error, OSError):
        cause = f"{error.filename or 'input/output'}: {error.strerror or error}"
        return 1, f"{cause}; check the path, its permissions and the free space"
    details = f"set {DEBUG_VARIABLE}=1 to see where, and report it"
    return 1, f"unexpected {type(error).__name__}: {error}; {details}"


def _quiet_libraries() -> None:
    """Keep progress and advice of the libraries below off the user's screen; ours goes to stderr."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get(DEBUG_VARIABLE):
        warnings.simplefilter("ignore")
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)


if __name__ == "__main__":
    from chai_export.__main__ import run

    sys.exit(run())
