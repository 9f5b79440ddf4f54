"""A user's mistake gives one line that names the cause, an exit code, and leaves nothing half done."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Outcome


def fails(outcome: Outcome, *parts: str, code: int = 1) -> bool:
    """Exit code, exactly one line on stderr that starts with `error: ` and names every part, no traceback."""
    lines = outcome.err.strip().splitlines()
    assert outcome.code == code, outcome.err
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: "), outcome.err
    for part in parts:
        assert part in lines[0], outcome.err
    assert outcome.out == ""
    return True


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def clusters_file(folder: Path, kept: list[int]) -> Path:
    path = folder / "clusters.json"
    path.write_text(json.dumps({"format": "chai-clusters/1", "kept_heads": kept}), encoding="utf-8")
    return path


def leftovers(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(entry.name for entry in folder.iterdir())


def test_missing_model(command: Command, tmp_path, text, clusters):
    nowhere = tmp_path / "nowhere"
    assert fails(command("calibrate", nowhere, "--text", text, "-o", tmp_path / "c.json"), str(nowhere))
    assert fails(command("export", nowhere, "--clusters", clusters, "-o", tmp_path / "b"), str(nowhere))
    assert leftovers(tmp_path) == []


def test_model_that_is_no_decoder(command: Command, tmp_path, clusters):
    model = tmp_path / "bert"
    model.mkdir()
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32}
    (model / "config.json").write_text(json.dumps(config))
    assert fails(command("export", model, "--clusters", clusters, "-o", tmp_path / "b"), "decoder")
    assert leftovers(tmp_path) == ["bert"]


def test_damaged_safetensors(command: Command, tmp_path, tiny_model, clusters):
    model = copy_of(tiny_model, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert fails(command("export", model, "--clusters", clusters, "-o", tmp_path / "b"), "weights")
    assert leftovers(tmp_path) == ["model"]


def test_damaged_onnx(command: Command, tmp_path, clusters):
    source = tmp_path / "model.onnx"
    source.write_bytes(b"\x08\x0a\x12 this is no protobuf" * 7)
    assert fails(command("rewrite", source, "--clusters", clusters, "-o", tmp_path / "b"), "model.onnx")
    assert fails(command("inspect", source), "model.onnx")


def test_missing_external_data(command: Command, tmp_path, bundle, clusters):
    source = tmp_path / "model.onnx"
    shutil.copy(bundle / "model.onnx", source)
    outcome = command("rewrite", source, "--clusters", clusters, "-o", tmp_path / "b")
    assert fails(outcome, "model.onnx.data")


def test_clusters_of_another_model(command: Command, tmp_path, tiny_model):
    output = tmp_path / "b"
    for kept, part in (([5, 3, 1], "3"), ([5, 9], "9"), ([5, 0], "0")):
        clusters = clusters_file(tmp_path, kept)
        assert fails(
            command("export", tiny_model, "--clusters", clusters, "-o", output), "clusters.json", part
        )
    assert not output.exists()


def test_clusters_that_are_none(command: Command, tmp_path, tiny_model):
    clusters = tmp_path / "clusters.json"
    for content in ("", "[]", '{"format": "other/1", "kept_heads": [1, 1]}', '{"format": "chai-clusters/1"}'):
        clusters.write_text(content)
        outcome = command("export", tiny_model, "--clusters", clusters, "-o", tmp_path / "b")
        assert fails(outcome, "clusters.json")


def test_text_that_is_empty_or_shorter_than_a_sample(command: Command, tmp_path, tiny_model):
    text = tmp_path / "text.txt"
    text.write_text("")
    output = tmp_path / "clusters.json"
    assert fails(command("calibrate", tiny_model, "--text", text, "-o", output), "text.txt", "empty")
    text.write_text("just a few words")
    outcome = command("calibrate", tiny_model, "--text", text, "-o", output, "--keep", "all")
    assert fails(outcome, "--seq-len")
    assert fails(command("calibrate", tiny_model, "--text", text, "-o", output), "give more text")
    assert leftovers(tmp_path) == ["text.txt"]


def test_text_that_does_not_exist(command: Command, tmp_path, tiny_model, bundle):
    text = tmp_path / "text.txt"
    assert fails(command("calibrate", tiny_model, "--text", text, "-o", tmp_path / "c.json"), "text.txt")
    assert fails(command("eval", bundle, "--text", text), "text.txt")


def test_budget_out_of_reach_names_the_largest(command: Command, tmp_path, tiny_model, text):
    heads = json.loads((tiny_model / "config.json").read_text())["num_key_value_heads"]
    outcome = command(
        "calibrate", tiny_model, "--text", text, "-o", tmp_path / "c.json",
        "--keep", "budget:0.6", "--samples", 2, "--seq-len", 16,
    )  # fmt: skip
    assert fails(outcome, "0.6", f"{(heads - 1) / (2 * heads):.4f}"[:-1])
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("rule", ["elbows", "budget:", "budget:x", "1,2,3", "0,1", "9,1", "@nowhere.json"])
def test_keep_rule_that_makes_no_sense(command: Command, tmp_path, tiny_model, text, rule):
    outcome = command(
        "calibrate", tiny_model, "--text", text, "-o", tmp_path / "c.json",
        "--keep", rule, "--samples", 2, "--seq-len", 16,
    )  # fmt: skip
    assert outcome.code in {1, 2}
    assert fails(outcome, code=outcome.code)
    assert not (tmp_path / "c.json").exists()


def test_output_that_cannot_be_written(command: Command, tmp_path, tiny_model, clusters, text):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    assert fails(command("export", tiny_model, "--clusters", clusters, "-o", blocker / "b"), str(blocker))
    outcome = command(
        "calibrate", tiny_model, "--text", text, "-o", blocker / "c.json", "--samples", 2, "--seq-len", 16
    )
    assert fails(outcome, str(blocker))
    assert blocker.read_text() == "not a folder"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes fails as on a full disk (EFBIG instead of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_disk_full_leaves_no_half_bundle(command: Command, tmp_path, tiny_model, clusters):
    with largest_file(20_000):
        outcome = command("export", tiny_model, "--clusters", clusters, "-o", tmp_path / "b")
    assert fails(outcome)
    assert leftovers(tmp_path) == []


def test_killed_export_leaves_no_half_bundle_and_the_next_one_works(
    command: Command, tmp_path, tiny_model, clusters
):
    output = tmp_path / "b"
    arguments = ["export", str(tiny_model), "--clusters", str(clusters), "-o", str(output), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "chai_export.cli.main", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if list(tmp_path.glob(".b.chai-partial/new/*")):
                break
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert leftovers(tmp_path), "the export never began to write"
    assert not output.exists()
    assert command(*arguments).code == 0
    assert leftovers(tmp_path) == ["b"]


def test_prompt_longer_than_the_limit_names_the_flag(command: Command, bundle):
    ids = ",".join(["7"] * 20)
    assert fails(command("run", bundle, "--token-ids", ids, "--max-seq", 16), "--max-seq")


def test_empty_prompt(command: Command, bundle):
    outcome = command("run", bundle, "--token-ids", "")
    assert fails(outcome, "--token-ids", code=2)
    assert fails(command("run", bundle), "--prompt", code=2)


def test_token_id_outside_the_vocabulary(command: Command, bundle, tiny_model):
    size = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    assert fails(command("run", bundle, "--token-ids", f"5,{size}"), str(size))


def test_changed_bundle_file_is_noticed(command: Command, tmp_path, bundle):
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    weights = copy / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert fails(command("run", copy, "--token-ids", "1,2,3"), "model.onnx.data", "SHA-256")
    weights.unlink()
    assert fails(command("run", copy, "--token-ids", "1,2,3"), "model.onnx.data", "missing")


def test_folder_that_is_no_bundle(command: Command, tmp_path):
    assert fails(command("run", tmp_path, "--prompt", "x"), "manifest.json")
    assert fails(command("inspect", tmp_path / "nowhere"), "nowhere")


def test_unknown_backend(command: Command, bundle):
    for arguments in (
        ("build", bundle, "--backend", "abacus"),
        ("run", bundle, "--prompt", "x", "--backend", "abacus"),
    ):
        outcome = command(*arguments)
        assert outcome.code in {1, 2}
        assert fails(outcome, "abacus", "onnxruntime", code=outcome.code)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--temperature", each) for each in ("nan", "inf", "-inf", "-1")]
    + [("--top-p", each) for each in ("nan", "0", "1.5", "-0.5")]
    + [("--top-k", "-1"), ("--seed", "-1"), ("--seed", str(2**64))],
)
def test_sampling_settings_out_of_range_are_refused_before_the_bundle_is_read(
    command: Command, tmp_path, flag, value
):
    outcome = command("run", tmp_path / "no bundle", "--token-ids", "1,2", f"{flag}={value}")
    assert fails(outcome, f"{flag} is ", "give ", code=2)


def test_wrong_usage_exits_with_two(command: Command, bundle):
    for arguments in ((), ("frobnicate",), ("run",), ("run", bundle, "--heads", "some")):
        outcome = command(*arguments)
        assert outcome.code == 2
        assert "usage:" in outcome.err
        assert "Traceback" not in outcome.err


def test_recipe_with_a_typo_names_the_setting(command: Command, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: x\ncalibrate: {text: [a.txt], sampels: 3}\n")
    assert fails(command("make", recipe), "recipe.yaml", "sampels")
    recipe.write_text("model: [\n")
    assert fails(command("make", recipe), "recipe.yaml")
    assert fails(command("make", tmp_path / "none.yaml"), "none.yaml")


def test_an_onnx_file_as_reference_is_looked_at(command: Command, tmp_path, bundle, text):
    source = tmp_path / "model.onnx"
    source.write_bytes(b"")
    assert fails(command("verify", bundle, "--reference", source), "model.onnx", "export")
    assert fails(
        command("eval", bundle, "--text", text, "--reference", source), "only `chai-export verify` takes"
    )


@pytest.mark.parametrize("option", ["--token-ids", "--temperature", "--prompt-file"])
def test_two_dashes_as_a_value_are_a_value(command: Command, bundle, option):
    outcome = command("run", bundle, f"{option}=--")
    assert outcome.code != 0
    assert "unexpected" not in outcome.err
    assert "--" in outcome.err


def test_a_link_to_itself_is_named(command: Command, tmp_path):
    (tmp_path / "model.onnx").symlink_to(tmp_path / "model.onnx")
    assert fails(command("inspect", tmp_path), "is a link to", "download the model again")
