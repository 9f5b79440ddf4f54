"""Every command does what its help says, and prints the JSON that the contract promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import REPOSITORY, Command

COMMANDS = (
    "calibrate", "export", "rewrite", "build", "run", "verify", "eval", "compare", "package", "report",
    "inspect", "make", "doctor",
)  # fmt: skip


def config_of(model: Path) -> dict[str, int]:
    config: dict[str, int] = json.loads((model / "config.json").read_text())
    return config


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_and_json(command: Command, name):
    outcome = command(name, "--help")
    assert outcome.code == 0
    assert f"chai-export {name}" in outcome.out.split("example:")[1]
    assert "--json" in outcome.out


def test_help_lists_every_command_and_needs_no_heavy_library():
    program = (
        "import sys\n"
        "from chai_export.cli.parser import parser\n"
        "print(parser().format_help())\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert all(name in answer.stdout for name in COMMANDS)


def test_calibrate_writes_clusters_and_a_plot(command: Command, tmp_path, tiny_model, text):
    output, plot = tmp_path / "clusters.json", tmp_path / "curves.png"
    outcome = command(
        "calibrate", tiny_model, "--text", text, "-o", output, "--plot", plot,
        "--samples", 4, "--seq-len", 32, "--keep", "budget:0.2", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    clusters = json.loads(output.read_text())
    assert outcome.json == clusters
    assert clusters["format"] == "chai-clusters/1"
    heads = config_of(tiny_model)["num_key_value_heads"]
    assert (clusters["num_layers"], clusters["num_query_heads"], clusters["num_kv_heads"]) == (
        2,
        heads,
        heads,
    )
    assert len(clusters["kept_heads"]) == 2
    assert 0.2 <= clusters["kv_bytes_saved"] < 0.2 + 1 / (4 * heads)
    for curve in clusters["error_curves"]:
        assert len(curve) == heads
        assert curve == sorted(curve, reverse=True)
        assert curve[-1] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters.json", "curves.png"]


def test_inspect_tells_what_a_bundle_holds(command: Command, bundle, tiny_model):
    facts = command("inspect", bundle, "--json").json
    assert facts["kind"] == "bundle"
    assert facts["kept_heads"] == [5, 3]
    assert facts["ops"]["chai::ClusteredHeadAttention"] == 2
    assert "Softmax" not in facts["ops"]
    config = config_of(tiny_model)
    heads = config["num_key_value_heads"]
    head_bytes = 4 * config["head_dim"]
    assert facts["kv_bytes_per_token_all_heads"] == 2 * heads * 2 * head_bytes
    assert facts["kv_bytes_per_token"] == (5 + 3 + 2 * heads) * head_bytes
    shown = command("inspect", bundle)
    assert shown.code == 0
    assert "5, 3" in shown.out
    assert "ClusteredHeadAttention" in shown.out


def test_inspect_of_a_bundles_graph_says_that_it_is_rewritten_already(command: Command, bundle):
    outcome = command("inspect", bundle / "model.onnx")
    assert outcome.code == 1
    assert outcome.err == ""
    assert "has been already" in outcome.out


def test_run_prints_results_of_a_batch(command: Command, bundle):
    outcome = command(
        "run", bundle, "--token-ids", "3,4,5,6,7,8", "--token-ids", "9,10", "--max-new-tokens", 8, "--json"
    )
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert [result["prompt_tokens"] for result in report["results"]] == [6, 2]
    for result in report["results"]:
        assert 1 <= len(result["token_ids"]) <= 8
        assert result["stop_reason"] in {"eos", "stop", "length", "capacity"}
    assert (report["heads"], report["backend"]) == ("chai", "onnxruntime")
    assert 0 < report["kv_cache_bytes"] < report["kv_cache_bytes_all_heads"]
    assert report["ttft_ms"] > 0
    alone = command("run", bundle, "--token-ids", "9,10", "--max-new-tokens", 8, "--json").json
    assert alone["results"][0]["token_ids"] == report["results"][1]["token_ids"]


def test_run_streams_the_text_it_would_print(command: Command, bundle):
    arguments = ("run", bundle, "--prompt", "a b c", "--max-new-tokens", 12)
    assert command(*arguments, "--stream").out == command(*arguments).out


def test_run_with_all_heads_uses_the_same_bundle(command: Command, bundle):
    arguments = (
        "run",
        bundle,
        "--token-ids",
        "3,4,5,6,7,8",
        "--max-new-tokens",
        4,
        "--json",
        "--heads",
        "all",
    )
    report = command(*arguments).json
    assert report["heads"] == "all"
    assert report["kv_cache_bytes"] == report["kv_cache_bytes_all_heads"]


def test_run_reads_prompts_from_a_file(command: Command, bundle, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b c\nd e f\n")
    results = command("run", bundle, "--prompt-file", prompts, "--max-new-tokens", 2, "--json").json[
        "results"
    ]
    assert [result["prompt"] for result in results] == ["a b c", "d e f"]


@pytest.mark.parametrize("option", [("--weight-block", 128), ("--weight-method", "hqq"), ("--float-head",)])
def test_an_option_of_quantised_weights_alone_is_wrong_usage(command, tiny_model, tmp_path, option):
    outcome = command("export", tiny_model, *option, "-o", tmp_path / "bundle")
    assert outcome.code == 2
    assert outcome.err == f"error: {option[0]} is for quantised weights; give --weights int4 or int8 too\n"
    assert not (tmp_path / "bundle").exists()


def test_build_records_the_engine(command: Command, tmp_path, tiny_model, clusters):
    bundle = tmp_path / "bundle"
    assert command("export", tiny_model, "--clusters", clusters, "-o", bundle).code == 0
    limits = ("--max-seq", 64, "--cache-memory", "64MiB")
    outcome = command("build", bundle, "--backend", "onnxruntime", *limits, "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["max_seq"], outcome.json["cache_memory"]) == (64, 64 << 20)
    assert command("inspect", bundle, "--json").json["engines"]["onnxruntime"]
    assert command("run", bundle, "--token-ids", "3,4,5", "--max-new-tokens", 2).code == 0


def test_verify_passes_for_the_model_and_fails_for_another(command: Command, bundle, tiny_model, tmp_path):
    outcome = command("verify", bundle, "--reference", tiny_model, "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["ok"] is True
    assert max(report["max_abs_logit_diff"].values()) <= report["tolerance"] < 1e-3
    assert max(report["tolerance_used"].values()) <= 1.0
    assert report["greedy_match"] == {"all": True, "chai": True}
    assert report["head_map_agreement"] == 1.0
    other = _with_one_weight_changed(tiny_model, tmp_path)
    outcome = command("verify", bundle, "--reference", other, "--json")
    assert outcome.code == 1
    assert outcome.json["ok"] is False


def _with_one_weight_changed(model: Path, folder: Path) -> Path:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(model, folder / "other"))
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in sorted(weights) if "v_proj" in name)
    weights[name] *= 1.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_eval_reports_both_perplexities(command: Command, bundle, text):
    outcome = command("eval", bundle, "--text", text, "--max-tokens", 200, "--window", 64, "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert 0 < report["tokens"] <= 200
    for heads in ("all", "chai"):
        assert report[heads]["perplexity"] == pytest.approx(2.718281828 ** report[heads]["nll"], rel=1e-6)
    assert 0 <= report["top1_agreement"] <= 1
    assert report["kl"] >= 0


def test_make_runs_stages_once_and_again_only_when_something_changed(
    command: Command, tmp_path, tiny_model, text
):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"model: {tiny_model}\n"
        f"calibrate: {{text: [{text}], samples: 2, seq_len: 32, keep: '5,3'}}\n"
        f"eval: {{text: {text}, max_tokens: 64, window: 32}}\n"
        "run: {prompts: [a b c], max_new_tokens: 4}\n"
    )
    outcome = command("make", recipe, "--json")
    assert outcome.code == 0, outcome.err
    first = outcome.json
    assert set(first["stages"].values()) == {"done"}
    assert list(first["stages"]) == ["calibrate", "export", "build", "verify", "eval", "run"]
    assert first["verify"]["ok"]
    again = command("make", recipe, "--json").json
    assert set(again["stages"].values()) == {"up to date"}
    assert again["eval"] == first["eval"]
    recipe.write_text(recipe.read_text().replace("max_new_tokens: 4", "max_new_tokens: 5"))
    third = command("make", recipe, "--json").json
    assert {name for name, state in third["stages"].items() if state == "done"} == {"run"}
    recipe.write_text(recipe.read_text().replace("'5,3'", "'4,3'"))
    fourth = command("make", recipe, "--json").json
    assert set(fourth["stages"].values()) == {"done"}


def test_doctor_finds_a_backend_that_gives_the_known_answer(command: Command):
    outcome = command("doctor", "--json")
    assert outcome.code == 0, outcome.err
    checks = {check["name"]: check for check in outcome.json["checks"]}
    assert checks["onnxruntime, portable function body"]["works"]
    for check in checks.values():
        assert check["works"] or check["fix"]


def test_demo_recipe_names_files_that_exist():
    from chai_export.recipe.recipe import load_recipe

    recipe = load_recipe(REPOSITORY / "engines" / "demo.yaml")
    assert (Path(recipe.model) / "model.safetensors").is_file()
    assert all(path.is_file() for path in recipe.calibrate.text)
    assert recipe.eval is not None
    assert recipe.eval.text.is_file()
