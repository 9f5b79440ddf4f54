"""GGUF files as models: what is exported is what the file holds; what cannot be read is said in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chai_export.models.gguf_source import gguf_of
from chai_export.models.loading import load_model
from chai_export.models.tokenizer import load_tokenizer
from tests.helpers.gguf_files import tiny_llama, write_gguf


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    found = {}
    for kind in ("F32", "Q8_0", "Q4_0"):
        found[kind] = folder / kind.lower() / f"tiny-{kind}.gguf"
        found[kind].parent.mkdir()
        write_gguf(model, found[kind], kind)
    return found


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_the_model_is_what_the_file_s_blocks_hold(model, files, tmp_path, kind):
    weights = write_gguf(model, tmp_path / "again.gguf", kind)
    loaded = load_model(files[kind])
    assert loaded.dtype == torch.float32
    assert getattr(loaded.config, "quantization_config", None) is None
    state = loaded.state_dict()
    assert set(state) == set(weights)
    for name, expected in weights.items():
        np.testing.assert_array_equal(state[name].numpy(), expected, err_msg=name)


def test_a_folder_with_one_is_exported_verified_and_run(command, files, tmp_path, monkeypatch):
    source, bundle = files["Q4_0"].parent, tmp_path / "bundle"
    assert command("export", source, "-o", bundle).code == 0
    checked = command("verify", bundle, "--reference", files["Q4_0"], "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["ok"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["generation"]["eos_token_ids"] == [2]
    # What runs needs no package for GGUF.
    monkeypatch.setitem(sys.modules, "gguf", None)
    ran = command("run", bundle, "--prompt", "the heads", "--max-new-tokens", 4, "--json")
    assert ran.code == 0, ran.err
    assert len(json.loads(ran.out)["results"][0]["token_ids"]) in range(1, 5)


def test_the_tokenizer_is_that_of_the_file(files):
    tokenizer = load_tokenizer(files["F32"])
    assert tokenizer is not None
    assert tokenizer.eos_token_id == 2
    assert tokenizer.chat_template is not None
    assert tokenizer.decode(tokenizer("the heads")["input_ids"], skip_special_tokens=True) == "the heads"


def test_what_cannot_be_read_is_one_line(command, model, files, tmp_path, monkeypatch):
    whole = files["F32"].read_bytes()

    def case(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    write_gguf(model, tmp_path / "strange.gguf", architecture="mamba9")
    case("two/a.gguf", whole)
    case("two/b.gguf", whole)
    wrong = {
        case("cut.gguf", whole[: len(whole) // 3]): "cut.gguf",
        case("text.gguf", b"hello"): "is no GGUF file, in spite of its name",
        case("lfs.gguf", b"version https://git-lfs.github.com/spec/v1\n"): "git lfs pull",
        case("part-00001-of-00003.gguf", whole): "is one of 3 parts of a GGUF file; join them first",
        tmp_path / "two": "holds 2 GGUF files (a.gguf, b.gguf); give one of them",
        tmp_path / "strange.gguf": "is of architecture 'mamba9', which transformers does not read",
    }
    for source, message in wrong.items():
        outcome = command("export", source, "-o", tmp_path / "out")
        assert outcome.code == 1, source
        assert outcome.err.count("error: ") == 1
        assert message in outcome.err
        assert not (tmp_path / "out").exists()
    find = importlib.util.find_spec
    for absent in ("gguf", "accelerate"):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, absent=absent: None if name == absent else find(name, *rest),
        )
        outcome = command("export", files["F32"], "-o", tmp_path / "out")
        assert f"needs the package {absent}; pip install 'chai-export[gguf]'" in outcome.err


def test_a_folder_with_a_configuration_is_not_a_gguf_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert gguf_of(tmp_path) is None
