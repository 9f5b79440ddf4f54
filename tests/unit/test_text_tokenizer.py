"""The tokenizer that runs a bundle: ids and texts of transformers', without importing it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chai_export.bundle.environment import save_environment
from chai_export.bundle.text_tokenizer import RECORD, TextTokenizer
from chai_export.bundle.tokenizer import load_tokenizer, load_transformers_tokenizer
from chai_export.errors import ChaiError

TEXTS = [
    "The first token, then the second one .",
    "",
    "  spaces   and\ttabs\nlines\n\n",
    "Don't they ? naïve café 数 🙂 \u0301 x",
    "<s>the first</s> <extra> [INST] head<pad>",
    "token" * 40,
]
CORPUS = [*TEXTS, "def first(self): return the token that comes first", "one two three tokens and lines"] * 4
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def trained(model: Any, trainer: Callable[..., Any], **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    extra = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    made = trainer(vocab_size=300, special_tokens=[*SPECIAL.values()], show_progress=False, **extra)
    tokenizer.train_from_iterator(CORPUS, made)
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = trained(
        models.BPE(),
        trainers.BpeTrainer,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )
    tokenizer.add_tokens([AddedToken("<extra>", lstrip=True, rstrip=True, special=False)])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    tokenizer = trained(
        models.BPE(byte_fallback=True, unk_token="<unk>"),
        trainers.BpeTrainer,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    return tokenizer


def word_piece() -> Tokenizer:
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def unigram() -> Tokenizer:
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer,
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def padded() -> Tokenizer:
    """Saved with padding and truncation, which are for training."""
    tokenizer = byte_level()
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(4)
    return tokenizer


KINDS = [byte_level, sentencepiece_like, word_piece, unigram, padded]


def saved(tokenizer: Tokenizer, folder: Path, **options: Any) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, **options)
    save_environment(folder, tokenizer=fast)
    return fast


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "options", [{}, {"split_special_tokens": True}, {"clean_up_tokenization_spaces": True}]
)
def test_ids_and_texts_are_those_of_transformers(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    saved(kind(), tmp_path, **options)
    own, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(own, TextTokenizer)
    for text in TEXTS:
        for added in (True, False):
            ids = theirs(text, add_special_tokens=added)["input_ids"]
            assert own(text, add_special_tokens=added)["input_ids"] == ids
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert own.decode(ids, skip_special_tokens=skip) == expected
    assert (own.bos_token_id, own.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_chats_are_those_of_transformers(several: bool, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    chat = {"default": template, "tool_use": "{{ tools | tojson }}" + template} if several else template
    saved(byte_level(), tmp_path, chat_template=chat)
    own, theirs = load_tokenizer(tmp_path), load_transformers_tokenizer(tmp_path)
    assert isinstance(own, TextTokenizer)
    turns = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools):
        expected = theirs.apply_chat_template(turns, given, tokenize=False, add_generation_prompt=True)
        assert own.apply_chat_template(turns, given, tokenize=False, add_generation_prompt=True) == expected
    assert len(expected) > 10


def test_a_tokenizer_that_differs_stays_with_transformers(tmp_path: Path) -> None:
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
            return super()._encode_plus([t.upper() for t in text] if isinstance(text, list) else text.upper(),
                                        *args, **options)  # fmt: skip

    save_environment(tmp_path, tokenizer=Shouting(tokenizer_object=byte_level(), **SPECIAL))
    assert not (tmp_path / RECORD).exists()
    assert isinstance(load_tokenizer(tmp_path), PreTrainedTokenizerFast)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "other", "special_tokens": {}}'])
def test_a_record_of_another_kind_is_named(content: str, tmp_path: Path) -> None:
    saved(byte_level(), tmp_path)
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ChaiError, match=rf"{RECORD}.*again"):
        load_tokenizer(tmp_path)


def test_the_record_says_what_tokenizer_json_does_not(tmp_path: Path) -> None:
    saved(byte_level(), tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["special_tokens"] == SPECIAL
    assert record["split_special_tokens"] is False
