"""What clustering costs on a text: perplexity with all heads and with CHAI, and how often they agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chai_export.arguments import whole
from chai_export.bundle.choices import Backend
from chai_export.errors import ChaiError, UsageError
from chai_export.models.reference import load_reference
from chai_export.models.text import MOST_TOKENS, Text, leading_special_tokens, read_tokens
from chai_export.models.windows import consecutive_windows
from chai_export.progress import track
from chai_export.quality.divergence import Divergence
from chai_export.quality.generation import GreedyDivergence, greedy_divergence
from chai_export.quality.limits import position_limit
from chai_export.quality.reference import Logits, reference_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.runtime.runner import Runner

_MOST_NATS = 700.0
"""Where exp() nears the end of float64."""

_PROMPT_TOKENS = 32


def evaluate(
    bundle: str | Path,
    text: Text | Iterable[Text],
    *,
    backend: Backend | str = Backend.ONNXRUNTIME,
    max_tokens: int | None = None,
    window: int = 512,
    prompts: int = 4,
    new_tokens: int = 32,
    reference: str | Path | PreTrainedModel | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Perplexity of a bundle on a text with all heads and with CHAI, and how far the two are apart.

    The text is cut into windows, each fed as a sequence of its own that starts as the tokenizer starts
    sequences. Every token of the text but a window's first, when nothing precedes it, is predicted once.
    Only one window's logits exist at a time. Then the starts of some windows are continued greedily.

    Args:
        bundle: directory of the bundle.
        text: a file, a text or token ids.
        backend: the engine to run.
        max_tokens: use so many tokens of the text at most.
        window: tokens per sequence.
        prompts: starts of windows to continue, of 32 tokens each; 0 leaves ``divergence`` empty.
        new_tokens: tokens to make for each.
        reference: the Hugging Face model: all heads are then computed by it in torch, not by the bundle.
            A bundle with static membership needs it.
        trust_remote_code: run code that the reference brings along.

    Returns:
        ``{"tokens": predicted tokens, "all": {"nll", "perplexity"}, "chai": {…}, "top1_agreement", "kl",
        "kl_by_position": [{"first", "last", "tokens", "kl"}, …],
        "divergence": [{"prompt_tokens", "new_tokens", "first_difference"}, …]}``: nll in nats per token, kl =
        mean KL(all || chai) in nats. The last two are lists of
        :class:`~chai_export.quality.divergence.PositionRange` and
        :class:`~chai_export.quality.generation.GreedyDivergence`.

    Raises:
        ChaiError: the bundle, text or reference cannot be used, or the text is shorter than two tokens.
        UsageError: a setting makes no sense, or static membership without a reference.
    """
    from chai_export.runtime.runner import load

    whole(window, "--window", least=2)
    if max_tokens is not None:
        whole(max_tokens, "--max-tokens", least=2)
    whole(prompts, "--prompts", least=0)
    whole(new_tokens, "--new-tokens")
    chai = load(bundle, backend=backend, heads="chai")
    tokenizer = chai.tokenizer
    leading = leading_special_tokens(tokenizer)
    _require_room(chai, window)
    if window <= len(leading) + 1:
        raise UsageError(f"--window {window} leaves no room beside the special tokens; raise it")
    every = _all_heads(chai, reference, trust_remote_code=trust_remote_code)
    tokens = read_tokens(text, tokenizer, min(max_tokens or MOST_TOKENS, MOST_TOKENS))
    sequences = consecutive_windows(tokens, leading, window)
    if not sequences:
        raise ChaiError(f"the text has {len(tokens)} tokens, too few to predict one; give more text")
    sums = Divergence()
    skip = max(0, len(leading) - 1)
    for sequence in track(sequences, "evaluating", total=len(sequences)):
        targets = np.asarray(sequence[skip + 1 :])
        sums.add(every(sequence)[skip:-1], chai.logits(sequence)[skip:-1], targets, first_position=skip)
    texts = greedy_divergence(chai, every, _prompts(sequences, len(leading), prompts), new_tokens)
    return _result(sums, texts)


def _prompts(sequences: Sequence[list[int]], leading: int, count: int) -> list[list[int]]:
    """Starts of sequences spread evenly over the text: 32 tokens, or half of a sequence that is shorter."""
    if count == 0:
        return []
    taken = np.linspace(0, len(sequences) - 1, min(count, len(sequences))).round().astype(int)
    spread = [sequences[index] for index in taken]
    return [ids[: max(1, leading, min(_PROMPT_TOKENS, len(ids) // 2))] for ids in spread]


def _result(sums: Divergence, texts: Sequence[GreedyDivergence]) -> dict[str, Any]:
    """The figures, the first five named as in the public contract."""
    return {
        "tokens": sums.tokens,
        "all": _loss(sums.nll_all),
        "chai": _loss(sums.nll),
        "top1_agreement": sums.top1_agreement,
        "kl": sums.kl,
        "kl_by_position": [asdict(part) for part in sums.kl_by_position],
        "divergence": [asdict(text) for text in texts],
    }


def _loss(nll: float) -> dict[str, float]:
    return {"nll": nll, "perplexity": math.exp(nll) if nll < _MOST_NATS else math.inf}


def _all_heads(
    chai: Runner, reference: str | Path | PreTrainedModel | None, *, trust_remote_code: bool
) -> Logits:
    """Logits with all heads: of the bundle itself, or of the Hugging Face model where one is given."""
    from chai_export.runtime.runner import load

    manifest = chai.bundle.manifest
    if reference is not None:
        model = load_reference(reference, manifest, trust_remote_code=trust_remote_code)
        return reference_logits(model, chai.bundle, "all")
    if manifest.static is not None:
        raise UsageError(
            f"{chai.bundle.path} has static membership, so it cannot run with all heads: those it does not "
            "keep were cut away; give the model it came from with --reference MODEL"
        )
    return load(chai.bundle.path, backend=chai.backend, heads="all").logits


def _require_room(runner: Runner, window: int) -> None:
    limit = position_limit(runner)
    if limit is not None and window > limit:
        raise UsageError(f"--window {window} is longer than the {limit} positions the bundle has; lower it")
