"""lm-eval's view of a model: log-likelihoods and greedy text from anything that gives logits.

Import only where lm-eval is installed; :mod:`chai_export.quality.lm_eval_tasks` says so when it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from chai_export.models.logits import log_probabilities
from chai_export.models.windows import consecutive_windows
from chai_export.progress import track
from chai_export.quality.reference import Logits


class LogitsLM(LM):  # type: ignore[misc]
    """Scores requests one by one: each is a sequence of its own with its own head map, as at inference.

    Args:
        logits: the model.
        tokenizer: a transformers tokenizer.
        max_tokens: longest sequence; of longer ones the end is kept.
        prefix: tokens in front of a text without context; at least one is needed to predict the first.
    """

    def __init__(self, logits: Logits, tokenizer: Any, max_tokens: int, prefix: Sequence[int]) -> None:
        super().__init__()
        self._logits = logits
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._prefix = list(prefix)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the greedy one."""
        del disable_tqdm
        pairs = [self._encode(*request.args) for request in track(requests, "tokenising", len(requests))]
        return [self._score(*pair) for pair in track(pairs, "scoring", len(pairs))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap."""
        del disable_tqdm
        return [self._rolling(*request.args) for request in track(requests, "scoring", len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string."""
        del disable_tqdm
        return [self._generate(*request.args) for request in track(requests, "generating", len(requests))]

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # A space at the end of the context belongs to the continuation's first token.
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return self._prefix, self._tokenizer(continuation, add_special_tokens=False)["input_ids"]
        whole = self._tokenizer(stripped + continuation)["input_ids"]
        start = len(self._tokenizer(stripped)["input_ids"])
        return whole[:start], whole[start:]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = (context + continuation)[-self._max_tokens :]
        count = min(len(continuation), len(ids) - 1)
        logits = self._logits(ids[:-1])[-count:]
        log_p = log_probabilities(logits)
        targets = np.asarray(ids[-count:])
        total = float(log_p[np.arange(count), targets].sum())
        return total, bool((logits.argmax(axis=-1) == targets).all())

    def _rolling(self, text: str) -> float:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        windows = consecutive_windows(ids, self._prefix, self._max_tokens)
        return sum(self._score(self._prefix, window[len(self._prefix) :])[0] for window in windows)

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(settings.get("max_gen_toks", 256))
        ids = self._tokenizer(context)["input_ids"][-max(1, self._max_tokens - most) :]
        new: list[int] = []
        text = ""
        while len(new) < most:
            new.append(int(self._logits(ids + new)[-1].argmax()))
            text = str(self._tokenizer.decode(new, skip_special_tokens=True))
            ends = [text.find(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
            if new[-1] == self._tokenizer.eos_token_id:
                break
        return text
