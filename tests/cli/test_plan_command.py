"""`calibrate --loss | --bytes`: the plan it writes, what it says, and when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chai_export.clustering import planner
from tests.cli.conftest import Command

SMALL = ("--samples", 2, "--seq-len", 24)


@pytest.fixture(scope="module")
def plan(tmp_path_factory, tiny_model: Path, text: Path) -> Path:
    from chai_export.cli.main import main

    path = tmp_path_factory.mktemp("plan") / "plan.json"
    settings = ["--text", str(text), "--loss", "0.5", *map(str, SMALL)]
    assert main(["calibrate", str(tiny_model), *settings, "-o", str(path)]) == 0
    return path


def test_a_plan_has_the_form_of_the_contract(plan: Path):
    content = json.loads(plan.read_text())
    assert content["format"] == "chai-plan/1"
    assert content["rule"] == "loss 0.5"
    assert len(content["layers"]) == 2
    for layer in content["layers"]:
        assert 1 <= layer["kept_heads"] <= 6
        assert {layer["key_bits"], layer["value_bits"]} <= {16, 8, 4}
    assert {"perplexity_ratio", "kl"} <= set(content["expected"])
    assert {"tokens", "perplexity_ratio", "kl", "top1_agreement"} <= set(content["checked"])
    assert 0 < content["kv_bytes_share"] < 1
    assert content["forced"] is False


def test_the_last_lines_say_what_is_saved_and_what_it_costs(command, tmp_path, tiny_model, text, plan):
    outcome = command(
        "calibrate",
        tiny_model,
        "--text",
        text,
        "--from",
        plan,
        "--bytes",
        0.6,
        "-o",
        tmp_path / "p.json",
        *SMALL,
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["layers", "kept", "KV", "heads", "key", "bits", "value", "bits"]
    assert lines[-4].startswith("cache: ")
    assert "times smaller than all heads in float16" in lines[-4]
    assert lines[-3].startswith("heads: ")
    assert "values in " in lines[-3]
    assert lines[-2].startswith("expected: perplexity ")
    assert lines[-1].startswith("checked on ")
    assert json.loads((tmp_path / "p.json").read_text())["kv_bytes_share"] <= 0.6


def test_a_broken_promise_ends_with_1_and_no_file_and_force_marks_it(
    command: Command, tmp_path, tiny_model, text, plan, monkeypatch
):
    honest, output = planner._check_of, tmp_path / "p.json"
    monkeypatch.setattr(
        planner, "_check_of", lambda sums: honest(sums).model_copy(update={"perplexity_ratio": 1.02})
    )
    arguments = ("calibrate", tiny_model, "--check", text, "--from", plan, "-o", output, *SMALL)
    refused = command(*arguments, "--loss", 0.01)
    assert refused.code == 1
    (line,) = refused.err.splitlines()
    assert line.startswith("error: ")
    assert "raises perplexity by 2.00%" in line
    assert "more than the 1.00% asked for" in line
    assert not output.exists()
    forced = command(*arguments, "--loss", 0.01, "--force")
    assert forced.code == 0, forced.err
    assert "warning: the plan was forced" in forced.err
    assert json.loads(output.read_text())["forced"] is True
    assert command(*arguments, "--bytes", 0.5).code == 0


def test_settings_without_meaning_are_wrong_usage(command: Command, tmp_path, tiny_model, text):
    for options in (
        ("--loss", 0), ("--bytes", 2), ("--loss", 0.01, "--bytes", 0.4), ("--keep", "all", "--loss", 0.01),
        ("--plot", tmp_path / "c.png"),
    ):  # fmt: skip
        outcome = command("calibrate", tiny_model, "--text", text, "-o", tmp_path / "p.json", *options)
        assert outcome.code == 2, outcome.err
        assert outcome.err.splitlines()[-1].startswith("error: ")
    outcome = command("calibrate", tiny_model, "-o", tmp_path / "p.json")
    assert outcome.code == 2
    assert "--text FILE" in outcome.err
    assert list(tmp_path.iterdir()) == []
