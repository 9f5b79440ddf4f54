"""`chai-export`: parse the command line, call one stage, print its result."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from chai_export.cli import signals, streams
from chai_export.cli.parser import parser
from chai_export.errors import ChaiError, UsageError, printable
from chai_export.progress import note

DEBUG_VARIABLE = "CHAI_EXPORT_DEBUG"

_FIXES = {
    errno.ENOENT: "check the path, and that nothing removes it while the command runs",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "no file may be that large here; choose another disk or raise the limit (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What a user can do about an error of the system."""


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
            _flush_output()
            note(f"error: {printable(message)}")
            return code


def _run(argv: Sequence[str] | None) -> int:

    try:
        try:
            arguments = parser().parse_args(argv)
            _quiet_libraries()
            code: int = arguments.execute(arguments)
        except SystemExit:  # of argparse, whose help is still to be written
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say
        streams.discard_output()
        code = 1
    return code


def _flush_output() -> None:
    """What was printed before the error; nothing of it may be left when Python ends and flushes."""
    try:
        sys.stdout.flush()
    except (ChaiError, OSError):
        streams.discard_output()


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
        return 1, f"{cause}; {_FIXES.get(error.errno or 0, 'check the path and what lies there')}"
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
        for name in ("onnx_ir", "matplotlib"):
            logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    from chai_export.__main__ import run

    sys.exit(run())
