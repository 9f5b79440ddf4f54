"""Prompts from files, texts and ids."""

from __future__ import annotations

import pytest

from chai_export.errors import ChaiError
from chai_export.runtime.prompts import encode_prompt, read_prompt_file
from tests.helpers.tiny_graph import letters_tokenizer


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.txt", "one\n\n two \r\nthree", ["one", " two ", "three"]),
        ("p.txt", '"quoted" he said\n[1, 2]\n', ['"quoted" he said', "[1, 2]"]),
        ("p.txt", "a\u2028b\x0cc\n", ["a\u2028b\x0cc"]),
        ("p.txt", '\ufeff{"prompt": "x\\ny"}\n{"token_ids": [1, 2]}', ["x\ny", [1, 2]]),
        ("p.jsonl", '"x"\n[3]\n{"prompt": [4]}\n', ["x", [3], [4]]),
    ],
)
def test_files_of_lines_and_of_json_lines(tmp_path, name, text, prompts):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompt_file(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "holds no prompt"),
        (b'{"prompt": "x"}\n{"prompt"', "line 2 is not valid JSON"),
        (b'{"text": "x"}', "line 1 holds no prompt"),
        (b'{"prompt": [true]}', "line 1 holds no prompt"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_bad_file_is_one_line_with_the_place(tmp_path, content, message):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(ChaiError, match=message):
        read_prompt_file(tmp_path / "p")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ChaiError, match=r"no file .*absent; check --prompt-file"):
        read_prompt_file(tmp_path / "absent")


def test_text_is_encoded_as_the_tokenizer_does():
    tokenizer = letters_tokenizer(add_bos=True)
    assert encode_prompt("ab", tokenizer, 40, chat=False) == [0, 4, 5]
    assert encode_prompt("", tokenizer, 40, chat=False) == [0]


def test_chat_uses_the_template_and_no_second_bos():
    template = "<s>{{ messages[0]['content'] }}<end>{% if add_generation_prompt %}!{% endif %}"
    tokenizer = letters_tokenizer(add_bos=True, chat_template=template)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt("ab", tokenizer, 40, chat=True) == expected
    assert expected == [0, 4, 5, 2, 33]


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "chat", "message"),
    [
        ("", letters_tokenizer(), False, "prompt is empty"),
        ([], None, False, "prompt is empty"),
        ([1, 40], None, False, "token id 40 is not in the model's vocabulary of 40"),
        ([-1], None, False, "token id -1"),
        ("text", None, False, "has no tokenizer; give --token-ids"),
        ("text", letters_tokenizer(), True, "no chat template; leave out --chat"),
    ],
)
def test_a_prompt_that_cannot_be_used_says_why(prompt, tokenizer, chat, message):
    with pytest.raises(ChaiError, match=message):
        encode_prompt(prompt, tokenizer, 40, chat=chat)
