"""Plans on the command line: what `calibrate` writes and says, and what the other commands make of it."""

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
    honest, output = planner.check_of, tmp_path / "p.json"
    monkeypatch.setattr(
        planner, "check_of", lambda sums: honest(sums).model_copy(update={"perplexity_ratio": 1.02})
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


def hand_written(path: Path, *layers: tuple[int, int, int], **more: object) -> Path:
    names = ("kept_heads", "key_bits", "value_bits")
    content = {
        "format": "chai-plan/1",
        "layers": [dict(zip(names, layer, strict=True)) for layer in layers],
        **more,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


FORCED = {
    "forced": True, "rule": "loss 0.01",
    "checked": {"perplexity_ratio": 1.05, "kl": 0.05, "tokens": 100, "windows": 1, "top1_agreement": 0.9,
                "perplexity_error": 0.01},
}  # fmt: skip


def test_export_follows_the_plan_layer_by_layer_and_verify_passes(command: Command, tmp_path, tiny_model):
    plan, bundle = (
        hand_written(tmp_path / "plan.json", (5, 8, 4), (3, 4, 16), probe_tokens=7),
        tmp_path / "bundle",
    )
    outcome = command("export", tiny_model, "--plan", plan, "-o", bundle)
    assert outcome.code == 0, outcome.err
    content = command("inspect", bundle, "--json").json
    assert content["kept_heads"] == [5, 3]
    assert content["key_bits"] == [8, 4]
    assert content["value_bits"] == [4, 16]
    assert content["probe_tokens"] == 7
    assert json.loads((bundle / "plan.json").read_text())["layers"] == json.loads(plan.read_text())["layers"]
    assert not (bundle / "clusters.json").exists()
    assert command("verify", bundle, "--reference", tiny_model).code == 0
    assert command("run", bundle, "--token-ids", "5,6,7", "--max-new-tokens", 2).code == 0


def test_bits_override_the_plan(command: Command, tmp_path, tiny_model):
    plan, bundle = hand_written(tmp_path / "plan.json", (5, 4, 4), (3, 4, 4)), tmp_path / "bundle"
    outcome = command("export", tiny_model, "--clusters", plan, "--key-bits", 8, "-o", bundle)
    assert outcome.code == 0, outcome.err
    content = command("inspect", bundle, "--json").json
    assert content["kept_heads"] == [5, 3]
    assert (content["key_bits"], content["value_bits"]) == ([8, 8], [4, 4])


def test_without_a_plan_every_head_is_kept_in_8_bits(command: Command, tmp_path, tiny_model, clusters):
    assert command("export", tiny_model, "-o", tmp_path / "safe").code == 0
    content = command("inspect", tmp_path / "safe", "--json").json
    assert content["kept_heads"] == [6, 6]
    assert content["key_bits"] == content["value_bits"] == [8, 8]
    assert command("export", tiny_model, "--clusters", clusters, "-o", tmp_path / "heads").code == 0
    content = command("inspect", tmp_path / "heads", "--json").json
    assert content["kept_heads"] == [5, 3]
    assert content["key_bits"] == content["value_bits"] == [8, 8]
    exact = ("--key-bits", 0, "--value-bits", 0)
    assert command("export", tiny_model, *exact, "-o", tmp_path / "exact").code == 0
    assert command("inspect", tmp_path / "exact", "--json").json["key_bits"] == [0, 0]


def test_rewrite_takes_a_plan_too(command: Command, tmp_path):
    source = Path(__file__).parents[1] / "fixtures" / "onnx" / "C-torch-2.13.0-opset23-sdpa-mha"
    explained = command("rewrite", source, "--explain", "--json").json
    layers = [(6, 8, 4)] * explained["num_layers"]
    plan = hand_written(tmp_path / "plan.json", *layers)
    outcome = command("rewrite", source, "--plan", plan, "-o", tmp_path / "bundle")
    assert outcome.code == 0, outcome.err
    content = command("inspect", tmp_path / "bundle", "--json").json
    assert set(content["key_bits"]) == {8}
    assert set(content["value_bits"]) == {4}
    assert command("rewrite", source, "-o", tmp_path / "safe").code == 0
    assert set(command("inspect", tmp_path / "safe", "--json").json["key_bits"]) == {8}


def test_a_forced_plan_is_warned_of_by_export_run_and_report(command: Command, tmp_path, tiny_model):
    plan, bundle = hand_written(tmp_path / "plan.json", (5, 8, 8), (3, 8, 8), **FORCED), tmp_path / "bundle"
    commands = (
        ("export", tiny_model, "--plan", plan, "-o", bundle),
        ("run", bundle, "--token-ids", "5,6", "--max-new-tokens", 1),
        ("report", bundle, "-o", tmp_path / "report.html"),
    )
    for arguments in commands:
        outcome = command(*arguments)
        assert outcome.code == 0, outcome.err
        assert (
            "warning: the plan was forced: asked for loss 0.01, it raised perplexity by 5.00%" in outcome.err
        )
    assert "it raised perplexity by 5.00%" in (tmp_path / "report.html").read_text()


def test_plans_of_other_models_are_refused_before_the_work(command: Command, tmp_path, tiny_model):
    plan = hand_written(tmp_path / "plan.json", (5, 8, 8), (3, 8, 8), (3, 8, 8))
    outcome = command("export", tiny_model, "--plan", plan, "-o", tmp_path / "bundle")
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert "3 layers, the model has 2" in line
    assert not (tmp_path / "bundle").exists()


def test_a_recipe_plans_by_loss(command: Command, tmp_path, tiny_model, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\noutput: {tmp_path / 'out'}\n"
        f"calibrate: {{text: [{text}], loss: 0.5, samples: 2, seq_len: 24}}\nverify: null\n"
    )
    outcome = command("make", recipe)
    assert outcome.code == 0, outcome.err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    content = command("inspect", tmp_path / "out" / "bundle", "--json").json
    assert content["key_bits"] == [layer["key_bits"] for layer in plan["layers"]]
    assert "times smaller than all heads in float16" in outcome.out + outcome.err
    assert "calibrate: up to date" in (again := command("make", recipe)).out + again.err
