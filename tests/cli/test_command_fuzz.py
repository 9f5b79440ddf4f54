"""Wrong command lines by the thousand: each ends with one `error:` line, one JSON object or a result.

A run is made from its number alone; ``CHAI_FUZZ=FIRST:LAST`` runs others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import REPOSITORY
from tests.helpers.command_fuzz import Case, Material, faults, make_case
from tests.helpers.command_server import CommandServer, serving

IN_CI, ALL = range(200), range(200, 5200)
ONNX = REPOSITORY / "tests" / "fixtures" / "onnx" / "G-genai-0.18.0-cpu-fp32-gqa"


@pytest.fixture(scope="module")
def material(tmp_path_factory, bundle, clusters, text, tiny_model) -> Material:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "scratch").mkdir()
    own = Path(shutil.copytree(bundle, folder / "bundle"))
    return Material(folder / "scratch", tiny_model, own, ONNX, clusters, text)


@pytest.fixture(scope="module")
def server(material: Material) -> Iterator[CommandServer]:
    with serving(material.folder.parent) as server:
        yield server


def failures(
    numbers: range, material: Material, server: CommandServer
) -> list[tuple[int, Case, list[str], str]]:
    found = []
    for number in numbers:
        case = make_case(number, material)
        ended = server.run(case.arguments, case.shell)
        if wrong := faults(case, ended):
            end = ended.err.decode(case.shell.encoding, "replace").strip()[-600:]
            found.append((number, case, wrong, end))
    return found


def report(found: list[tuple[int, Case, list[str], str]]) -> str:
    return "\n\n".join(f"{number}: {case}\n  {wrong}\n  {end}" for number, case, wrong, end in found)


def test_no_command_line_ends_without_a_result_or_a_reason(material: Material, server: CommandServer) -> None:
    found = failures(IN_CI, material, server)
    assert not found, report(found)


@pytest.mark.slow
def test_no_command_line_of_thousands_does(material: Material, server: CommandServer) -> None:
    first, last = map(int, os.environ.get("CHAI_FUZZ", f"{ALL.start}:{ALL.stop}").split(":"))
    found = failures(range(first, last), material, server)
    assert not found, report(found)
