"""Text that is shown piece by piece: stop strings never show, characters are never cut."""

from __future__ import annotations

import random

import pytest

from chai_export.errors import UsageError
from chai_export.runtime.detokenizer import Detokenizer
from chai_export.runtime.stopping import StopStrings
from tests.helpers.tiny_graph import letters_tokenizer


def shown(strings: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stop = StopStrings(strings)
    out = [stop.push(piece) for piece in pieces]
    return [*out, stop.flush()], stop.found


@pytest.mark.parametrize(
    ("strings", "pieces", "text", "found"),
    [
        ([], ["a", "b"], "ab", False),
        (["END"], ["one E", "N", "D two"], "one ", True),
        (["END"], ["one EN", "E"], "one ENE", False),
        (["END"], ["one EN"], "one EN", False),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["xyz", "y"], ["wxy", "z"], "wx", True),
        (["b", "abc"], ["a", "bc"], "a", True),
        (["\n\n"], ["line\n", "\nnext"], "line", True),
    ],
)
def test_text_ends_before_the_first_stop_string(strings, pieces, text, found):
    out, was_found = shown(strings, pieces)
    assert ("".join(out), was_found) == (text, found)


def test_text_is_shown_as_soon_as_it_cannot_be_a_stop_string():
    assert shown(["END"], ["abc", "E", "x"])[0] == ["abc", "", "Ex", ""]


def test_nothing_is_shown_after_a_stop_string():
    assert shown(["."], ["a.", "b"]) == (["a", "", ""], True)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UsageError, match="--stop"):
        StopStrings([""])


def test_pieces_make_the_same_text_however_a_string_is_cut():
    text, strings = "the cat sat on the mat and the rat ran", ["the rat", "mat and the hat"]
    rng = random.Random(1)
    for _ in range(50):
        cuts = sorted(rng.sample(range(1, len(text)), 8))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert "".join(shown(strings, pieces)[0]) == "the cat sat on the mat and "


def test_a_character_of_two_tokens_is_shown_whole():
    tokenizer = letters_tokenizer()
    ids = tokenizer("a é!")["input_ids"]
    detokenizer = Detokenizer(tokenizer, tokenizer("hello")["input_ids"])
    assert [detokenizer.push(i) for i in ids] == ["a", " ", "", "é", "!"]
    assert detokenizer.flush() == ""


def test_a_character_cut_by_the_end_is_shown_as_unknown():
    tokenizer = letters_tokenizer()
    ids = tokenizer("aé")["input_ids"][:-1]
    detokenizer = Detokenizer(tokenizer, [4])
    assert [detokenizer.push(i) for i in ids] == ["a", ""]
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_give_no_text():
    detokenizer = Detokenizer(letters_tokenizer(), [0])
    assert [detokenizer.push(i) for i in (4, 2, 5)] == ["a", "", "b"]


def test_a_space_that_the_first_token_carries_is_kept():
    """SentencePiece drops the space in front of a text, so new tokens are not decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "\u2581hello": 1, "\u2581world": 2}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert tokenizer.decode([2]) == "world"
    assert Detokenizer(tokenizer, [1]).push(2) == " world"
