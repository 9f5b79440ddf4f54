"""A signal ends a command like a mistake does: one line, an exit code, nothing half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from chai_export.cli.main import main

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def run_with(setup: str, *arguments: str) -> subprocess.Popen[str]:
    """`chai-export` in a process of its own that runs ``setup`` first."""
    program = textwrap.dedent(setup) + "\nimport sys\nfrom chai_export.__main__ import run\nsys.exit(run())\n"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


STUCK = """
    import time
    from chai_export.cli import doctor
    def execute(arguments):
        print("ready", flush=True)
        try:
            time.sleep(60)
        except BaseException as error:
            if {wraps}:
                raise RuntimeError("a library's own words") from error
            raise
    doctor.execute = execute
"""


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_unwinds_to_one_line_and_128_plus_its_number(number, wraps):
    process = run_with(STUCK.format(wraps=wraps), "doctor")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.startswith(f"error: interrupted by {signal.Signals(number).name}; ")
    assert err.count("\n") == 1


def test_a_signal_that_was_ignored_when_the_command_began_stays_ignored():
    setup = """
        import os, signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        from chai_export.cli import doctor
        def execute(arguments):
            os.kill(os.getpid(), signal.SIGHUP)
            return 7
        doctor.execute = execute
    """
    process = run_with(setup, "doctor")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 7


@pytest.mark.parametrize(
    "moment",
    [
        "chai_export.cli.main",  # nothing of ours is there yet
        "chai_export.cli.parser",  # the commands are imported
        "chai_export.cli.bench",
    ],
)
def test_ctrl_c_while_modules_are_imported_or_arguments_parsed_is_one_line(moment):
    setup = f"""
        import os, signal, sys
        class Presser:
            def find_spec(self, name, path=None, target=None):
                if name == {moment!r}:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Presser())
    """
    process = run_with(setup, "doctor")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("error: interrupted")
    assert err.count("\n") == 1


def test_ctrl_c_after_the_work_says_nothing():
    setup = """
        import atexit, os, signal
        from chai_export.cli import doctor
        doctor.execute = lambda arguments: 0
        atexit.register(os.kill, os.getpid(), signal.SIGINT)
    """
    process = run_with(setup, "doctor")
    assert process.communicate(timeout=60) == ("", "")


@pytest.mark.parametrize("place", ["weak reference", "destructor"])
def test_a_signal_in_a_place_where_exceptions_are_dropped_is_not_lost(place):
    setup = f"""
        import os, signal, time, weakref
        from chai_export.cli import doctor
        class Thing:
            def __del__(self):
                if {place!r} == "destructor":
                    os.kill(os.getpid(), signal.SIGTERM)
        def callback(reference):
            if {place!r} == "weak reference":
                os.kill(os.getpid(), signal.SIGTERM)
        def execute(arguments):
            thing = Thing()
            reference = weakref.ref(thing, callback)
            del thing
            time.sleep(60)
        doctor.execute = execute
    """
    process = run_with(setup, "doctor")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.startswith("error: interrupted by SIGTERM; ")
    assert err.count("\n") == 1


def test_handlers_of_the_caller_come_back():
    before = [signal.getsignal(number) for number in ENDING]
    with pytest.raises(SystemExit):
        main(["--version"])
    assert [signal.getsignal(number) for number in ENDING] == before


def test_signals_in_quick_succession_are_still_one_line():
    process = run_with(STUCK.format(wraps=False), "doctor")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.0005)
    _, err = process.communicate(timeout=60)
    assert err.count("\n") <= 1
    assert process.returncode in {128 + signal.SIGTERM, -signal.SIGTERM}
