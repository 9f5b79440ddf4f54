"""One tiny model and one bundle of it, made through the command line, for all tests of commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chai_export.cli.main import main

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "tests" / "fixtures" / "models" / "llama-mha"


@dataclass
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Outcome]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `chai-export` in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return TINY


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of words that the tiny tokenizer knows or maps to its unknown token."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = (REPOSITORY / "examples" / "text" / "heldout.txt").read_text(encoding="utf-8")[:6000]
    path.write_text(words, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clusters") / "clusters.json"
    path.write_text(json.dumps({"format": "chai-clusters/1", "kept_heads": [5, 3]}), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, clusters: Path) -> Path:
    """A bundle of the tiny model; tests must not change it."""
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    exact = ["--key-bits", "0", "--value-bits", "0"]
    assert main(["export", str(TINY), "--clusters", str(clusters), *exact, "-o", str(path), "--json"]) == 0
    return path
