"""Sample texts side by side: what the model writes with its exact cache, and what the bundle writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.runtime.runner import Runner

NEW_TOKENS = 32
"""That each text goes on for, at most."""


def sample_texts(
    runner: Runner, model: PreTrainedModel, prompts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Greedy texts of the model in torch and of the bundle.

    Args:
        runner: of the bundle.
        model: that it came from.
        prompts: as the page shows them.
        token_ids: of the prompts.

    Returns:
        ``{"prompt", "new_tokens", "exact", "compiled", "common", "first_difference"}`` for each: tokens of
        the longer text, both texts, how many characters they have in common from the start, and the index of
        the first token that differs (None: none does).
    """
    made = runner.generate([list(ids) for ids in token_ids], NEW_TOKENS, repetition_penalty=1.0)
    ends = frozenset(runner.bundle.manifest.generation.eos_token_ids)
    rows = []
    for prompt, ids, generation in zip(prompts, token_ids, made, strict=True):
        # Where the bundle ran out of positions the model is not asked for more.
        count = len(generation.token_ids) if generation.stop_reason == "capacity" else NEW_TOKENS
        exact = _greedy(model, ids, count, ends)
        texts = [_text(runner, tokens) for tokens in (exact, generation.token_ids)]
        same = _first_difference(*texts)
        rows.append(
            {
                "prompt": prompt,
                "new_tokens": max(len(exact), len(generation.token_ids)),
                "exact": texts[0],
                "compiled": texts[1],
                "common": len(texts[0]) if same is None else same,
                "first_difference": _first_difference(exact, generation.token_ids),
            }
        )
    return rows


def _greedy(model: PreTrainedModel, ids: Sequence[int], count: int, ends: frozenset[int]) -> list[int]:
    """The likeliest tokens after a prompt, up to an end of sequence.

    Not ``model.generate``, which would follow the model's own generation defaults, such as a penalty.
    """
    made: list[int] = []
    fed, past = torch.tensor([list(ids)], dtype=torch.long), None
    with torch.inference_mode():
        while len(made) < count and not (made and made[-1] in ends):
            found = model(input_ids=fed, past_key_values=past, use_cache=True)
            past = found.past_key_values
            made.append(int(found.logits[0, -1].argmax()))
            fed = torch.tensor([made[-1:]])
    return made


def _text(runner: Runner, tokens: Sequence[int]) -> str:
    if runner.tokenizer is None:
        return " ".join(map(str, tokens))
    text: str = runner.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int | None:
    """Of tokens or of characters."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
