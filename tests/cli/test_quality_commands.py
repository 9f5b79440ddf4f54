"""compare, report and the measured budget from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Command


def test_compare_prints_every_method_asked_for(command: Command, tiny_model: Path, text: Path):
    outcome = command(
        "compare", tiny_model, "--text", text, "--keep", "5,3", "--methods", "chai,random",
        "--probe-tokens", "3,6", "--windows", 2, "--seq-len", 24, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = outcome.json["results"]
    assert [(row["method"], row["probe_tokens"]) for row in rows] == [
        ("chai", 3), ("random", 3), ("chai", 6), ("random", 6),
    ]  # fmt: skip
    assert all(row["kept_heads"] == [5, 3] for row in rows)


def test_compare_shows_a_table_and_names_an_unknown_method(command: Command, tiny_model: Path, text: Path):
    settings = ("--keep", "5,3", "--windows", 1, "--seq-len", 16)
    shown = command("compare", tiny_model, "--text", text, *settings, "--methods", "greedy")
    assert shown.code == 0, shown.err
    assert "greedy" in shown.out
    wrong = command("compare", tiny_model, "--text", text, *settings, "--methods", "magic")
    assert wrong.code == 2
    assert wrong.err.count("\n") == 1
    assert "'magic'" in wrong.err


def test_calibrate_measures_a_budget(command: Command, tmp_path: Path, tiny_model: Path, text: Path):
    outcome = command(
        "calibrate", tiny_model, "--text", text, "-o", tmp_path / "c.json", "--samples", 2, "--seq-len", 24,
        "--keep", "budget:0.2", "--measure", "kl", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.json["kv_bytes_saved"] >= 0.2
    assert [len(curve) for curve in outcome.json["kl_curves"]] == [6, 6]
    refused = command(
        "calibrate",
        tiny_model,
        "--text",
        text,
        "-o",
        tmp_path / "c.json",
        "--measure",
        "kl",
        "--keep",
        "elbow",
    )
    assert refused.code == 2


def test_report_writes_one_page_from_a_bundle_and_other_commands_json(
    command: Command, tmp_path: Path, bundle: Path, tiny_model: Path
):
    figures = {"tokens": 9, "all": {"nll": 2, "perplexity": 7}, "chai": {"nll": 2, "perplexity": 7.7}}
    (tmp_path / "eval.json").write_text(json.dumps({**figures, "top1_agreement": 0.5, "kl": 0.1}))
    page = tmp_path / "report.html"
    outcome = command(
        "report", bundle, "-o", page, "--reference", tiny_model, "--eval", tmp_path / "eval.json",
        "--prompt", "a prompt", "--prompt", "another prompt", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.json["bundle"]["kept_heads"] == [5, 3]
    assert len(outcome.json["correlations"]) == 2
    assert "+10.00 %" in page.read_text(encoding="utf-8")


def test_report_names_a_file_of_the_wrong_kind(command: Command, tmp_path: Path, bundle: Path):
    (tmp_path / "eval.json").write_text("{}")
    outcome = command("report", bundle, "-o", tmp_path / "page.html", "--eval", tmp_path / "eval.json")
    assert outcome.code == 1
    assert "chai-export eval" in outcome.err
    assert not (tmp_path / "page.html").exists()
