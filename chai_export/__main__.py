"""The process of `chai-export` and `python -m chai_export`: Ctrl-C never gives a traceback."""

import signal
import sys


def run() -> int:
    """Run the command line of this process; returns its exit code."""
    try:
        from chai_export.cli import streams
        from chai_export.cli.main import main

        streams.prepare()
        code = main()
    except KeyboardInterrupt:  # before main() was there to explain it
        print("error: interrupted; run the same command again", file=sys.stderr)
        code = 128 + signal.SIGINT
    # The work is done; Ctrl-C while Python takes itself down ends the process without more words.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


if __name__ == "__main__":
    sys.exit(run())
