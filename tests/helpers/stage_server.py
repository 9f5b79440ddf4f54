"""Runs `chai-export` many times, each in a process of its own that need not import the heavy libraries again.

``python -m tests.helpers.stage_server`` reads a JSON object a line (arguments, log, graph), forks
and prints the number of the child, then its exit status. :class:`StageServer` talks to it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass
class Run:
    """A finished command: its exit code (negative: a signal killed it), its stderr, its seconds."""

    code: int
    err: str
    seconds: float


class StageServer:
    """Starts commands in forked processes."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._log = folder / "log"

    def run(
        self,
        arguments: list[object],
        *,
        number: int | None = None,
        after: float = 0.0,
        graph: Path | None = None,
    ) -> Run:
        """Run one command.

        Args:
            arguments: of the command line.
            number: a signal to send when ``after`` seconds have passed.
            after: see ``number``.
            graph: an ONNX file that stands in for what torch would export.
        """
        words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in arguments]
        self._log.write_text("")
        began = time.monotonic()
        self._say(json.dumps({"arguments": words, "log": str(self._log), "graph": graph and str(graph)}))
        child = int(self._answer())
        if number is not None:
            time.sleep(max(0.0, began + after - time.monotonic()))
            os.kill(child, number)  # a zombie at worst: the server collects it after our answer
        self._say("")
        code = os.waitstatus_to_exitcode(int(self._answer()))
        return Run(code, self._log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - began)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server has died"
        return line


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[StageServer]:
    """A server whose commands run with ``environment`` and log into ``folder``."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.stage_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, **environment},
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield StageServer(process, folder)
    finally:
        process.communicate()


HEAVY = (
    "matplotlib.backends.backend_agg", "networkx", "onnxruntime", "onnxscript", "torch.export", "torch.onnx",
    "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "transformers",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "chai_export.cli.parser", "chai_export.clustering.calibrate", "chai_export.clustering.plot",
    "chai_export.engines.build", "chai_export.engines.onnxruntime",
    "chai_export.exporter.stage", "chai_export.exporter.torch_export", "chai_export.graph.pipeline",
    "chai_export.quality.verify", "chai_export.recipe.make", "chai_export.report.page",
    "chai_export.report.stage", "chai_export.runtime.runner", "chai_export.serve.triton_server.repository",
)  # fmt: skip


def _serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a child that is not yet the command just dies of it
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitpid(child, 0)[1], flush=True)


def _run(request: dict[str, Any]) -> NoReturn:
    """The command in this process, which ends with it."""
    from chai_export.__main__ import run

    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor, stream in ((null, 0), (null, 1), (log, 2)):
            os.dup2(descriptor, stream)
        if request["graph"] is not None:
            _stand_in(Path(request["graph"]))
        sys.argv[1:] = request["arguments"]
        code = run()
    finally:
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)


def _stand_in(graph: Path) -> None:
    from chai_export.exporter import torch_export

    def export_onnx(model: object, directory: Path) -> Path:
        return Path(shutil.copy(graph, directory / "model.onnx"))

    torch_export.export_onnx = export_onnx


if __name__ == "__main__":
    _serve()
