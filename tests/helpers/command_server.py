"""Runs `chai-export` as a process thousands of times: a server forks for each, so that imports cost once.

What a shell decides about a process is part of a command here: its streams, their encoding, its arguments as
bytes. ``python -m tests.helpers.command_server`` reads a JSON object a line and answers with one.
"""

from __future__ import annotations

import atexit
import importlib
import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers.stage_server import HEAVY

STREAMS = ("kept", "closed", "full", "broken")
"""What a stream may lead to: a pipe that is read, nothing, a full disk, a pipe whose reader has gone."""
ENCODINGS = ("utf-8", "ascii", "latin-1", "utf-16")
_LONGEST_SECONDS = 60


@dataclass(frozen=True)
class Shell:
    """How a command is started."""

    stdin: str = "kept"
    stdout: str = "kept"
    stderr: str = "kept"
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Ended:
    """A finished command: exit code (negative: a signal killed it), and what it wrote where that was kept."""

    code: int
    out: bytes
    err: bytes


class CommandServer:
    """Runs one command after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, arguments: Sequence[object], shell: Shell = Shell()) -> Ended:
        """Run a command; paths and texts may hold any bytes, as surrogates."""
        words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in arguments]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": words, "shell": asdict(shell)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server has died"
        answer = json.loads(line)
        return Ended(answer["code"], answer["out"].encode("latin-1"), answer["err"].encode("latin-1"))


@contextmanager
def serving(folder: Path) -> Iterator[CommandServer]:
    """A server whose commands have ``folder`` as working directory, home and cache."""
    environment = {
        **os.environ,
        **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")},
        **{name: str(folder) for name in ("HOME", "XDG_CACHE_HOME")},
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.command_server"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield CommandServer(process)
    finally:
        process.communicate()


def _serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_answer(request["arguments"], Shell(**request["shell"]))), flush=True)


def _answer(arguments: list[str], shell: Shell) -> dict[str, Any]:
    pipes = {1: os.pipe(), 2: os.pipe()}
    child = os.fork()
    if child == 0:
        _run(arguments, shell, {stream: write for stream, (_, write) in pipes.items()})
    for _, write in pipes.values():
        os.close(write)
    printed = _read({stream: read for stream, (read, _) in pipes.items()}, child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "out": printed[1].decode("latin-1"), "err": printed[2].decode("latin-1")}


def _read(pipes: dict[int, int], child: int) -> dict[int, bytes]:
    """All that comes out of the pipes; a command that says nothing for a minute is killed."""
    printed = dict.fromkeys(pipes, b"")
    streams = {read: stream for stream, read in pipes.items()}
    while streams:
        ready, _, _ = select.select(list(streams), [], [], _LONGEST_SECONDS)
        if not ready:
            os.kill(child, signal.SIGKILL)
        for read in ready:
            piece = os.read(read, 1 << 16)
            if piece:
                printed[streams[read]] += piece
            else:
                os.close(read)
                del streams[read]
    return printed


def _run(arguments: list[str], shell: Shell, pipes: dict[int, int]) -> NoReturn:
    """The command in this process, which ends with it."""
    from chai_export.__main__ import run

    code = 70
    try:
        _connect(0, shell.stdin, os.open(os.devnull, os.O_RDONLY))
        _connect(1, shell.stdout, pipes[1])
        _connect(2, shell.stderr, pipes[2])
        for inherited in set(range(3, 64)) - {pipes[2]}:
            _close(inherited)
        # As Python makes them when it starts.
        sys.stdin = None if shell.stdin == "closed" else open(0, closefd=False)  # noqa: SIM115
        sys.stdout = _text(1, shell.stdout, shell.encoding, "strict")
        sys.stderr = _text(2, shell.stderr, shell.encoding, "backslashreplace")
        sys.argv[1:] = arguments
        try:
            code = run()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        code = _end(code)
    except BaseException:  # what Python would print of it at its end
        import traceback

        text = traceback.format_exc().encode(errors="replace")
        os.write(pipes[2] if shell.stderr != "kept" else 2, text)
        code = 71
    finally:
        os._exit(code)


def _end(code: int) -> int:
    """The end of a process: exit handlers, then the streams; 120 as Python where stdout cannot be flushed."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except Exception:
            return 120
    return code


def _connect(stream: int, kind: str, kept: int) -> None:
    if kind == "kept":
        os.dup2(kept, stream)
    elif kind == "closed":
        _close(stream)
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_RDWR), stream)
    else:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, stream)


def _close(descriptor: int) -> None:
    with suppress(OSError):
        os.close(descriptor)


def _text(stream: int, kind: str, encoding: str, errors: str) -> Any:
    if kind == "closed":
        return None
    return io.TextIOWrapper(open(stream, "wb", closefd=False), encoding=encoding, errors=errors)


if __name__ == "__main__":
    _serve()
