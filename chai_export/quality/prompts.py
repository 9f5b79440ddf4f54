"""The texts that `verify` looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chai_export.errors import ChaiError
from chai_export.models.text import Text, leading_special_tokens, read_tokens

if TYPE_CHECKING:
    from chai_export.runtime.runner import Runner

LONGEST_PROMPT = 24
"""Tokens, beside those of the probe."""
SEED = 20240312


def verify_prompts(runner: Runner, text: Text | None, limit: int | None) -> list[list[int]]:
    """Four prompts of different lengths, one shorter than the probe, one just past it.

    Args:
        runner: of the bundle.
        text: where they come from; random tokens otherwise.
        limit: positions there are, None for no limit.

    Raises:
        ChaiError: the text cannot be read, or is too short.
    """
    manifest = runner.bundle.manifest
    probe = manifest.probe_tokens
    lengths = [max(1, probe - 2), probe + 1, LONGEST_PROMPT // 2 + probe, LONGEST_PROMPT + probe]
    if limit is not None:
        lengths = [max(1, min(length, limit // 2)) for length in lengths]
    leading = leading_special_tokens(runner.tokenizer)
    needed = sum(lengths)
    if text is None:
        tokens = np.random.default_rng(SEED).integers(0, manifest.vocab_size, needed).astype(np.int32)
    else:
        tokens = read_tokens(text, runner.tokenizer, needed)
        if len(tokens) < needed:
            raise ChaiError(f"the text has {len(tokens)} tokens, the prompts need {needed}; give more text")
    prompts = []
    for length in lengths:
        prompts.append((leading + tokens[:length].tolist())[:length])
        tokens = tokens[length:]
    return prompts


def room_after(longest_prompt: int, wanted: int, limit: int | None) -> int:
    """New tokens that a prompt leaves room for, ``wanted`` at most.

    Raises:
        ChaiError: there is no room.
    """
    room = wanted if limit is None else min(wanted, limit - longest_prompt)
    if room < 1:
        raise ChaiError(
            f"the bundle has {limit} positions, too few to verify prompts of {longest_prompt} tokens; "
            "build the engine with a larger --max-seq"
        )
    return room
