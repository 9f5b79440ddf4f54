"""Tokenizers in the forms that folders have them: text is cut as in training, or it is refused."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import pytest
import sentencepiece

from chai_export.bundle import environment
from chai_export.bundle.tokenizer import load_tokenizer as load_saved
from chai_export.errors import ChaiError
from chai_export.models import tokenizer as module
from chai_export.models.tokenizer import load_tokenizer
from tests.helpers.families import family_config

TEXT = "The op  keeps 1234 heads,\n\tin a naïve way: 数."
ROOT = Path(__file__).parents[2]


def pieces(kind: str, *, prefix: bool = True) -> bytes:
    """A SentencePiece file as models have it: byte fallback, digits apart, a space put in front or not."""
    written = io.BytesIO()
    lines = (ROOT / "docs/op.md").read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, model_type=kind, vocab_size=400,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=prefix, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture(scope="module")
def bpe() -> bytes:
    return pieces("bpe")


def folder(directory: Path, family: str, content: bytes, config: dict[str, object] | None) -> Path:
    family_config(family).save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(content)
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def ids(tokenizer, text: str = TEXT) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama-gqa", {"tokenizer_class": "LlamaTokenizer"}),
        ("llama-gqa", {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
        ("llama-gqa", None),
        ("mistral-gqa", {"tokenizer_class": "LlamaTokenizer"}),
        ("phi3-gqa", None),
        ("qwen2-gqa", {"tokenizer_class": "LlamaTokenizer"}),
        ("opt", None),
    ],
)
def test_tokenizer_model_alone_is_read_as_sentencepiece_reads_it(tmp_path, bpe, family, config):
    tokenizer = load_tokenizer(folder(tmp_path, family, bpe, config))
    assert ids(tokenizer) == sentencepiece.SentencePieceProcessor(model_proto=bpe).encode(TEXT)
    assert tokenizer.decode(ids(tokenizer)) == TEXT


def test_a_file_without_the_space_in_front_is_read_so_too(tmp_path):
    content = pieces("bpe", prefix=False)
    tokenizer = load_tokenizer(folder(tmp_path, "gemma-gqa", content, {"tokenizer_class": "GemmaTokenizer"}))
    assert ids(tokenizer) == sentencepiece.SentencePieceProcessor(model_proto=content).encode(TEXT)


def test_the_first_token_is_added_as_the_folder_says(tmp_path, bpe):
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    tokenizer = load_tokenizer(folder(tmp_path, "mistral-gqa", bpe, config))
    assert tokenizer(TEXT)["input_ids"] == [1, *ids(tokenizer)]


def test_a_bundle_keeps_the_tokenizer_that_was_read(tmp_path, bpe):
    tokenizer = load_tokenizer(folder(tmp_path / "model", "mistral-gqa", bpe, None))
    (tmp_path / "bundle").mkdir()
    environment.save_environment(tmp_path / "bundle", tokenizer=tokenizer)
    assert ids(load_saved(tmp_path / "bundle")) == ids(tokenizer)


def test_a_file_that_transformers_reads_otherwise_is_refused(tmp_path):
    """It takes pieces of other scores from unigram models than SentencePiece does."""
    source = folder(tmp_path, "llama-gqa", pieces("unigram"), {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(ChaiError, match=r"tokens would be wrong; copy the model's tokenizer\.json beside it"):
        load_tokenizer(source)


def test_tokenizer_json_is_taken_at_its_word(tmp_path, bpe, monkeypatch):
    """SentencePiece is not asked where the whole tokenizer is there."""
    tokenizer = load_tokenizer(folder(tmp_path, "llama-gqa", bpe, {"tokenizer_class": "LlamaTokenizer"}))
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(module, "_processor", lambda path: pytest.fail("asked"))
    assert ids(load_tokenizer(tmp_path)) == ids(tokenizer)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_pointer_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 42\n")
    with pytest.raises(ChaiError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(tmp_path)


# Llama 3 has tiktoken's form under the same name.
TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.mark.parametrize("content", [b"\0\1\2", TIKTOKEN, b""], ids=["noise", "tiktoken", "empty"])
def test_a_file_that_is_none_of_sentencepiece_is_one_line(tmp_path, content, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # not a dependency of ours
    with pytest.raises(ChaiError) as caught:
        load_tokenizer(folder(tmp_path, "llama-gqa", content, {"tokenizer_class": "LlamaTokenizer"}))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
