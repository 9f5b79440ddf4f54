"""eval, compare, report, static bundles and the measured budget from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.tokenizer import encode, load_tokenizer
from chai_export.recipe.recipe import load_recipe
from tests.cli.conftest import REPOSITORY, Command


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
    settings = ("--keep", "5,3", "--windows", 1, "--seq-len", 24)
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


def test_eval_shows_positions_and_texts_besides_the_figures_of_the_contract(
    command: Command, bundle: Path, text: Path, tiny_model: Path
):
    settings = ("eval", bundle, "--text", text, "--max-tokens", 130, "--window", 64)
    outcome = command(*settings, "--prompts", 2, "--new-tokens", 5, "--reference", tiny_model, "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert list(report)[:5] == ["tokens", "all", "chai", "top1_agreement", "kl"]
    assert sum(part["tokens"] for part in report["kl_by_position"]) == report["tokens"]
    assert [text["new_tokens"] for text in report["divergence"]] == [5, 5]
    shown = command(*settings, "--prompts", 1, "--new-tokens", 2)
    assert shown.code == 0, shown.err
    assert "32-63" in shown.out
    assert "greedy texts:" in shown.out
    assert "greedy texts" not in command(*settings, "--prompts", 0).out


def test_a_recipe_can_measure_its_budget_and_choose_its_probe(
    command: Command, tmp_path: Path, tiny_model: Path, text: Path
):
    recipe = tmp_path / "tiny.yaml"
    settings = (
        f"model: {tiny_model}\n"
        f"calibrate: {{text: [{text}], samples: 2, seq_len: 24, keep: 'budget:0.2', measure: kl}}\n"
        "verify: null\n"
        "build: {max_seq: 64, cache_memory: 64MiB}\n"
        f"eval: {{text: {text}, max_tokens: 64, window: 32, prompts: 1, new_tokens: 3}}\n"
    )
    recipe.write_text(settings)
    assert load_recipe(recipe).probe_tokens == 16
    recipe.write_text(settings + "probe_tokens: 5\n")
    outcome = command("make", recipe, "--json")
    assert outcome.code == 0, outcome.err
    clusters = json.loads((tmp_path / "out" / "tiny" / "clusters.json").read_text())
    assert len(clusters["kl_curves"]) == 2
    assert clusters["probe_tokens"] == 5
    assert command("inspect", outcome.json["bundle"], "--json").json["probe_tokens"] == 5
    assert Bundle.load(outcome.json["bundle"]).manifest.engines["onnxruntime"].cache_memory == 64 << 20
    assert [text["new_tokens"] for text in outcome.json["eval"]["divergence"]] == [3]


def test_a_recipe_names_a_measure_that_does_not_exist(command: Command, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: x\ncalibrate: {text: [a.txt], measure: damage}\n")
    outcome = command("make", recipe)
    assert outcome.code == 1
    assert "measure" in outcome.err


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
    run = command("run", bundle, "--prompt", "a prompt", "--max-new-tokens", 32, "--json").json["results"][0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), load_tokenizer(bundle)
    ids = torch.tensor([encode(tokenizer, "a prompt")])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 32, "do_sample": False}
    exact = model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
    first = outcome.json["texts"][0]
    assert (first["prompt"], first["compiled"]) == ("a prompt", run["text"])
    assert first["exact"] == tokenizer.decode(exact, skip_special_tokens=True)
    assert first["new_tokens"] == max(len(exact), len(run["token_ids"]))
    pairs = zip([*exact, None], [*run["token_ids"], None], strict=False)
    assert first["first_difference"] == next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert first["exact"][: first["common"]] == first["compiled"][: first["common"]]


def test_report_refuses_a_reference_of_other_sizes_and_shows_a_scoreboard(
    command: Command, tmp_path: Path, bundle: Path, clusters: Path
):
    page, other = tmp_path / "report.html", REPOSITORY / "examples" / "pydoc-5m"
    refused = command("report", bundle, "-o", page, "--reference", other)
    assert refused.code == 1
    assert refused.err.splitlines()[-1].startswith("error: the bundle has num_layers 2 and the reference")
    assert not page.exists()
    row = {
        "setting": "8/8",
        "bytes_share": 0.6,
        "perplexity_change": 0.01,
        "perplexity_error": 0.01,
        "kl": 0.02,
    }
    rows = [{**row, "method": name, "on_op": True, "top1_agreement": 0.9} for name in ("plan", "bits")]
    names = {name: {"method": method, "setting": "8/8"} for name, method in
             (("plan", "plan"), ("on_op", "bits"), ("any", "bits"))}  # fmt: skip
    board = {"model": "m", "tokens": 9, "windows": 1, "seq_len": 10, "rows": rows, "at_equal_bytes": [names],
             "missing": {}}  # fmt: skip
    (tmp_path / "compare.json").write_text(json.dumps(board))
    shown = command("report", bundle, "-o", page, "--compare", tmp_path / "compare.json")
    assert shown.code == 0, shown.err
    assert "is better than a plan at 1 of" in page.read_text(encoding="utf-8")
    refused = command("report", bundle, "-o", page, "--compare", clusters)
    assert "is not the output of chai-export compare (no 'rows' or 'results')" in refused.err


def test_static_bundles_are_verified_evaluated_and_reported(
    command: Command, tmp_path: Path, tiny_model: Path, clusters: Path, text: Path
):
    static, page = tmp_path / "static", tmp_path / "page.html"
    membership = ("--membership", "static", "--text", text)
    assert command("export", tiny_model, "--clusters", clusters, "-o", static, *membership).code == 0
    gate = command("verify", static, "--reference", tiny_model, "--json")
    assert gate.code == 0, gate.err
    assert gate.json["max_abs_logit_diff"]["all"] is None
    assert gate.json["greedy_match"] == {"all": None, "chai": True}
    assert "not compared" in command("verify", static, "--reference", tiny_model).out
    settings = ("eval", static, "--text", text, "--max-tokens", 130, "--window", 64)
    refused = command(*settings)
    assert refused.code == 2
    assert "--reference" in refused.err
    figures = command(*settings, "--reference", tiny_model, "--json")
    assert figures.code == 0, figures.err
    assert figures.json["kl"] > 0
    (tmp_path / "eval.json").write_text(figures.out)
    (tmp_path / "verify.json").write_text(gate.out)
    given = ("--eval", tmp_path / "eval.json", "--verify", tmp_path / "verify.json")
    assert command("report", static, "-o", page, *given).code == 0
    assert "static membership" in page.read_text(encoding="utf-8")


def test_a_recipe_can_ask_for_static_membership(
    command: Command, tmp_path: Path, tiny_model: Path, text: Path
):
    recipe = tmp_path / "static.yaml"
    recipe.write_text(
        f"model: {tiny_model}\n"
        f"calibrate: {{text: [{text}], samples: 2, seq_len: 32, keep: '5,3'}}\n"
        "export: {membership: static}\n"
        f"eval: {{text: {text}, max_tokens: 64, window: 32}}\n"
        "run: {prompts: [a b c], max_new_tokens: 4}\n"
    )
    outcome = command("make", recipe)
    assert outcome.code == 0, outcome.err
    assert "--- CHAI" in outcome.out
    assert "--- all heads" not in outcome.out
    made = command("make", recipe, "--json").json
    assert set(made["stages"].values()) == {"up to date"}
    assert made["verify"]["max_abs_logit_diff"]["all"] is None
    assert made["eval"]["all"]["perplexity"] > 0
    assert json.loads((tmp_path / "out" / "static" / "bundle" / "manifest.json").read_text())["static"]


def test_report_names_a_file_of_the_wrong_kind(command: Command, tmp_path: Path, bundle: Path):
    (tmp_path / "eval.json").write_text("{}")
    outcome = command("report", bundle, "-o", tmp_path / "page.html", "--eval", tmp_path / "eval.json")
    assert outcome.code == 1
    assert "chai-export eval" in outcome.err
    assert not (tmp_path / "page.html").exists()
