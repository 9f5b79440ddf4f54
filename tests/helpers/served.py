"""The server as users start it: a process that listens on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = "from chai_export.__main__ import run; import sys; sys.exit(run())"


@dataclass
class Served:
    """A process that serves, and what it said of itself."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait for what another process does."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.01)

    def idle(self) -> bool:
        """Whether no text runs or waits, and every page is free or kept for texts to come."""
        running = self.metric("chai_running_texts") + self.metric("chai_waiting_texts")
        return running == 0 and self.metric("chai_held_pages") == self.metric("chai_kept_pages")


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Served]:
    """`chai-export serve` on a free port of this machine, ended by SIGTERM."""
    words = [sys.executable, "-c", PROGRAM, "serve", str(bundle), "--port", "0", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            line = process.stdout.readline()
            if not line:
                raise AssertionError(process.communicate()[1])
            lines.append(line)
        yield Served(process, json.loads("".join(lines)))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
