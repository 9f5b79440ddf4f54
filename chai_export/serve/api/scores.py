"""Log-probabilities as the two kinds of answers show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chai_export.serve.logprobs import Score

_LEAST = -9999.0
"""JSON has no infinity."""


class TokenTexts:
    """What single tokens read as."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = str(
                self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
        return self._known[token]


def completion_logprobs(
    scores: Sequence[tuple[int, Score | None]], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """``logprobs`` of a completion: token ids with their scores, of which the first of a prompt has none.

    ``offset`` is where the first token's text begins.
    """
    tokens = [texts[token] for token, _ in scores]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if score is None else _shown(score.logprob) for _, score in scores],
        "top_logprobs": [None if score is None else _top(score, texts) for _, score in scores],
        "text_offset": offsets,
    }


def _top(score: Score, texts: TokenTexts) -> dict[str, float]:
    """By text; of tokens that read alike the likeliest counts. The chosen token is always there."""
    found: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        found.setdefault(texts[token], _shown(logprob))
    return found


def chat_logprobs(scores: Sequence[Score], texts: TokenTexts) -> dict[str, Any]:
    """``logprobs`` of a chat's answer."""
    return {
        "content": [
            {
                **_entry(score.token, score.logprob, texts),
                "top_logprobs": [_entry(token, logprob, texts) for token, logprob in score.top],
            }
            for score in scores
        ],
        "refusal": None,
    }


def _entry(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text = texts[token]
    return {"token": text, "logprob": _shown(logprob), "bytes": list(text.encode())}


def _shown(logprob: float) -> float:
    return max(logprob, _LEAST)
