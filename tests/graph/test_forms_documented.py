"""The letters of the forms mean the same in the code, in what the commands print and in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from chai_export.cli.main import main
from chai_export.graph.match.form import Form
from tests.helpers.onnx_fixtures import REWRITTEN

DOCS = Path(__file__).parents[2] / "docs" / "how-it-works.md"


def test_the_docs_have_every_form_as_it_is_described_in_the_code() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    letters = [row for row in rows if len(row.split(" | ")[0]) == len("| A")]
    assert letters == [f"| {form.value} | {form.description} |" for form in Form]


@pytest.mark.parametrize("command", [["inspect"], ["rewrite", "--explain"]])
def test_commands_say_what_the_letters_that_they_print_mean(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = REWRITTEN[0]
    assert main([*command, str(fixture.path)]) == 0
    form = Form(capsys.readouterr().out.splitlines()[1].split()[1])
    assert main([*command, str(fixture.path)]) == 0
    assert f"form {form.value}: {form.description}" in capsys.readouterr().out
