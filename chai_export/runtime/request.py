"""One prompt on its way to a text: its tokens, how much of them the cache holds, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from chai_export.runtime.detokenizer import Detokenizer
from chai_export.runtime.likeliest import Scores
from chai_export.runtime.sampling import Sampler
from chai_export.runtime.stopping import StopReason, StopStrings


@dataclass(frozen=True)
class Limits:
    """What a text runs into: tokens to make, positions there are, end-of-sequence ids, and the lengths past
    which all of its keys are rotated otherwise."""

    max_new_tokens: int
    max_positions: int
    eos_token_ids: Collection[int] = ()
    switch_lengths: Collection[int] = ()


@dataclass
class Request:
    """A prompt and its text so far. ``cached`` tokens of ``ids`` are in the cache."""

    index: int
    ids: list[int]
    limits: Limits
    sampler: Sampler
    stop: StopStrings
    detokenizer: Detokenizer | None
    on_text: Callable[[int, str], None] | None = None
    cached: int = 0
    text: str = ""
    stop_reason: StopReason | None = None
    head_map: NDArray[np.int32] | None = None
    token_times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)

    @property
    def new_ids(self) -> list[int]:
        """Tokens made so far, an end-of-sequence token included."""
        return self.ids[self.prompt_tokens :]

    @property
    def most_tokens(self) -> int:
        """Positions that prompt and text can take at most; the last token of a text is not fed."""
        return min(self.prompt_tokens + self.limits.max_new_tokens - 1, self.limits.max_positions)

    def next_window(self, probe_tokens: int, chunk: int) -> tuple[int, int]:
        """The tokens to feed next, as positions (start, end).

        While fewer than ``probe_tokens`` are cached the head map is not settled, and all of them go in again
        as a fresh row. A fresh row's first chunk holds the whole probe if there is one.
        """
        start = self.cached if self.cached >= probe_tokens else 0
        return start, min(len(self.ids), start + max(chunk, probe_tokens))

    def fed(self, end: int) -> bool:
        """Note that the cache holds ``end`` tokens; True if the next token can be chosen now."""
        self.cached = end
        return end == len(self.ids)

    def accept(self, logits: Scores) -> None:
        """Choose the next token by its scores; sets ``stop_reason`` if the text ends with it."""
        token = self.sampler.choose(logits, self.ids)
        if len(self.ids) in self.limits.switch_lengths:
            self.cached = 0  # what the cache holds was rotated for a text that ends here
        self.ids.append(token)
        self.token_times.append(perf_counter())
        is_eos = token in self.limits.eos_token_ids
        if not is_eos:
            self._show(self.stop.push(self.detokenizer.push(token)) if self.detokenizer else "")
        self.stop_reason = self._reason(is_eos=is_eos)
        if self.stop_reason and not self.stop.found:
            self._finish_text()

    def _reason(self, *, is_eos: bool) -> StopReason | None:
        if is_eos:
            return StopReason.EOS
        if self.stop.found:
            return StopReason.STOP
        if len(self.ids) - self.prompt_tokens >= self.limits.max_new_tokens:
            return StopReason.LENGTH
        # The token just chosen would have to be fed at a position that does not exist.
        return StopReason.CAPACITY if len(self.ids) > self.limits.max_positions else None

    def _finish_text(self) -> None:
        rest = self.stop.push(self.detokenizer.flush()) if self.detokenizer else ""
        self._show(rest + self.stop.flush())
        if self.stop.found and self.stop_reason is not StopReason.EOS:
            self.stop_reason = StopReason.STOP

    def _show(self, text: str) -> None:
        self.text += text
        if text and self.on_text is not None:
            self.on_text(self.index, text)
