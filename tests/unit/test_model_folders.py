"""Every kind of folder that people give as a model: loaded, or one line says what it is and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from chai_export.errors import ChaiError
from chai_export.models.loading import load_model
from tests.helpers.families import family_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 4294967296\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one safetensors file."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    family_model("llama-gqa", num_hidden_layers=1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / "model"
    family_model("llama-gqa", num_hidden_layers=1).save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def as_torch(directory: Path) -> None:
    """The same weights as pytorch_model.bin, as it was usual until 2023."""
    (directory / "model.safetensors").unlink()
    torch.save(family_model("llama-gqa", num_hidden_layers=1).state_dict(), directory / "pytorch_model.bin")


def with_old_constants(directory: Path) -> None:
    """Checkpoints of 2023 hold the frequencies of their rotary embeddings."""
    as_torch(directory)
    state = torch.load(directory / "pytorch_model.bin")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, directory / "pytorch_model.bin")


@pytest.mark.parametrize("change", [lambda directory: None, as_torch, with_old_constants])
def test_the_forms_that_transformers_reads_are_loaded(whole, tmp_path, change):
    directory = shutil.copytree(whole, tmp_path / "model")
    change(directory)
    expected = family_model("llama-gqa", num_hidden_layers=1).lm_head.weight
    torch.testing.assert_close(load_model(directory).lm_head.weight, expected)


def test_shards_are_loaded_also_through_links(sharded, tmp_path):
    """The hub's cache has links into its store in the place of files."""
    for file in sharded.iterdir():
        (tmp_path / file.name).symlink_to(file)
    expected = family_model("llama-gqa", num_hidden_layers=1).lm_head.weight
    torch.testing.assert_close(load_model(tmp_path).lm_head.weight, expected)


def refusal(source: Path) -> str:
    with pytest.raises(ChaiError) as caught:
        load_model(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


MERGE = "merge the adapter first"
GIVE = "give the folder of"
OTHERS_OWN = "holds weights in their authors' own format"
# Which files of a whole model stay, which are put beside them, what the message says it is, and what to do.
ALL, CONFIG, NONE = ("config.json", "model.safetensors"), ("config.json",), ()
REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, str]] = {
    "nothing": (NONE, (), "is empty", GIVE),
    "adapter": (
        NONE, ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
        "holds a LoRA adapter, not a whole model (adapter_config.json)",
        f"{MERGE}: peft.AutoPeftModelForCausalLM",
    ),
    "adapter with a config": (CONFIG, ("adapter_config.json",), "holds a LoRA adapter beside a model", MERGE),
    "adapter beside its base": (ALL, ("adapter_config.json",), "holds a LoRA adapter beside a model", MERGE),
    "gguf": (NONE, ("Tiny-Q4_K_M.GGUF", "README.md"), "is no GGUF file, in spite of its name", "again"),
    "gguf with config": (
        CONFIG, ("tiny-q8_0.gguf",), "but GGUF weights beside a configuration", "give the GGUF file itself",
    ),
    "diffusers": (
        NONE, ("model_index.json", "unet/config.json"),
        "a diffusers pipeline", "give a language model",
    ),
    "nemo": (
        NONE, ("tiny.nemo",),
        "holds a NeMo checkpoint (tiny.nemo)", "convert it to a Hugging Face model",
    ),
    "mistral's own": (NONE, ("consolidated.safetensors", "params.json", "tekken.json"), OTHERS_OWN, GIVE),
    "mistral's own with config": (CONFIG, ("consolidated.safetensors",), "authors' own format", GIVE),
    "meta's own": (NONE, ("consolidated.00.pth", "params.json", "tokenizer.model"), OTHERS_OWN, GIVE),
    "deepspeed": (
        NONE, ("zero_to_fp32.py", "latest"),
        "holds a DeepSpeed checkpoint", "zero_to_fp32.py first",
    ),
    "fsdp": (CONFIG, ("__0_0.distcp", ".metadata"), "a distributed torch checkpoint", "with save_pretrained"),
    "bundle": (
        NONE, ("manifest.json", "model.onnx"),
        "holds a bundle", "give the model that it was made from",
    ),
    "openvino": (CONFIG, ("openvino_model.xml",), "an OpenVINO model", GIVE),
    "onnx": (CONFIG, ("model.onnx",), "an ONNX model (model.onnx)", "with: chai-export rewrite"),
    "tensorflow": (CONFIG, ("tf_model.h5",), "TensorFlow weights", GIVE),
    "flax": (CONFIG, ("flax_model.msgpack",), "Flax weights", GIVE),
    "archive": (NONE, ("model.tar.gz",), "holds an archive (model.tar.gz)", "unpack it first"),
    "config only": (CONFIG, (), "has no weights", "download the model again"),
    "other name": (
        CONFIG, ("tuned.safetensors",),
        "holds tuned.safetensors, but no model.safetensors", "rename it",
    ),
    "shards without index": (
        CONFIG, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "neither model.safetensors nor model.safetensors.index.json", "download it again",
    ),
    "trainer's output": (
        NONE, ("checkpoint-500/config.json", "runs/x"),
        "has no config.json, but", "checkpoint-500 has one; give that folder",
    ),
    "hub cache": (
        NONE, ("blobs/4d7a", "refs/main", "snapshots/1b2c/config.json"),
        "has no config.json, but", "snapshots/1b2c has one; give that folder",
    ),
    "other things": (
        NONE, ("photo.jpg",),
        "has no config.json, so it is no Hugging Face model", "check the path",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_model_is_told_in_one_line(whole, tmp_path, kind):
    kept, added, cause, fix = REFUSED[kind]
    directory = tmp_path / "model"
    directory.mkdir()
    for name in kept:
        shutil.copy(whole / name, directory)
    for name in added:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x")
    message = refusal(directory)
    assert cause in message
    assert fix in message.split(cause, 1)[1]
    assert str(directory) in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_git_and_a_broken_download_leave_is_named(whole, tmp_path, name):
    directory = shutil.copytree(whole, tmp_path / "model")
    (directory / name).write_text(POINTER)
    assert f"{directory / name} is a Git LFS pointer" in refusal(directory)
    assert "git lfs pull" in refusal(directory)
    (directory / name).write_text("")
    assert f"{directory / name} is empty; download it again" in refusal(directory)


def test_a_missing_shard_is_named(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "model")
    second = sorted(directory.glob("model-*.safetensors"))[1]
    second.write_text(POINTER)
    assert f"{second} is a Git LFS pointer" in refusal(directory)
    second.unlink()
    assert f"lacks 1 of the {len(list(sharded.glob('model-*')))} weight files" in refusal(directory)
    assert f"({second.name}); download them again" in refusal(directory)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "\xff"]
)
def test_a_damaged_index_is_named(sharded, tmp_path, content):
    directory = shutil.copytree(sharded, tmp_path / "model")
    (directory / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    assert "model.safetensors.index.json" in refusal(directory)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("tiny-q4_0.gguf", "is no GGUF file, in spite of its name; download it again"),
        ("model.onnx", "is an ONNX model; compile it with: chai-export rewrite"),
        ("model.tar.gz", "is an archive; unpack it first"),
        ("adapter_config.json", "is a LoRA adapter, not a whole model; merge the adapter first"),
        ("model.safetensors", "is a file; give the directory that holds config.json"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_told_apart(tmp_path, name, cause):
    (tmp_path / name).write_bytes(b"x")
    assert cause in refusal(tmp_path / name)


def changed_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_that_the_configuration_has_no_place_for_are_not_dropped(whole, tmp_path):
    """transformers drops biases of projections, and whole layers, without an error."""
    directory = tmp_path / "model"
    family_model("qwen2-gqa", num_hidden_layers=1).save_pretrained(directory)
    changed_config(directory, model_type="llama", architectures=["LlamaForCausalLM"])
    message = refusal(directory)
    assert "without a place in its config.json (model.layers.0.self_attn.k_proj.bias, " in message
    assert "use the config.json that belongs to them" in message


def test_a_model_without_an_output_head_is_named(tmp_path):
    from transformers import AutoModelForSequenceClassification

    from tests.helpers.families import family_config

    config = family_config("llama-gqa", num_hidden_layers=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    message = refusal(tmp_path / "model")
    assert "lacks 1 of its weights (lm_head.weight); it is a LlamaForSequenceClassification" in message


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantised_checkpoints_are_refused_by_their_method(method, whole, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "model")
    changed_config(directory, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    message = refusal(directory)
    assert f"its weights are quantised by {method}; use the original float checkpoint" in message
    assert "export --weights" in message


def test_weights_quantised_by_mlx_are_refused(whole, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "model")
    changed_config(directory, quantization={"group_size": 64, "bits": 4})
    assert "its weights are quantised" in refusal(directory)
