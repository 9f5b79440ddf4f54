"""One text that the engine makes: its request, what else is wanted of it, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError
from chai_export.runtime.likeliest import Likeliest, Scores
from chai_export.runtime.request import Request
from chai_export.runtime.stopping import StopReason
from chai_export.serve.logprobs import Score, score


class LogitsEdit(Protocol):
    """Something that changes logits before a token is chosen."""

    def edit(self, logits: NDArray[np.float32], new_ids: Sequence[int]) -> None:
        """Change logits [V] in place, given the tokens made so far."""
        ...

    def chosen(self, token: int) -> None:
        """Note the token that was chosen."""
        ...


@dataclass(frozen=True)
class Piece:
    """What one token added: text that is certain now (may be empty), and its score if that was asked for."""

    token: int
    text: str
    score: Score | None


@dataclass(frozen=True)
class End:
    """The last event of a job: why its text ended, or what went wrong; neither if it was aborted."""

    reason: StopReason | None = None
    error: ChaiError | None = None


Event = Piece | End


class Job:
    """A request on its way through the engine.

    Args:
        request: the prompt and its text so far.
        listen: called with each event, on the engine's thread; it returns soon and raises nothing.
        top: score every token of the text, with so many of the likeliest; None for no scores.
        score_prompt: score the tokens of the prompt too.
        edits: what changes logits, in this order.
    """

    def __init__(
        self,
        request: Request,
        listen: Callable[[Event], None],
        *,
        top: int | None = None,
        score_prompt: bool = False,
        edits: Sequence[LogitsEdit] = (),
    ) -> None:
        self.request = request
        self.listen = listen
        self.number = 0
        self.row: int | None = None
        self.end: End | None = None
        self.reused_tokens: int | None = None
        self.submitted = perf_counter()
        self.prompt_scores: list[Score | None] = [None]
        self._top = top
        self._score_prompt = score_prompt and top is not None
        self._edits = tuple(edits)

    @property
    def scores_prompt_now(self) -> bool:
        """Whether logits of prompt tokens are wanted that were not computed yet."""
        return self._score_prompt and len(self.prompt_scores) < self.request.prompt_tokens

    @property
    def wanted(self) -> int | None:
        """How many of the likeliest tokens its next step has to bring; None for all logits."""
        return None if self._edits or self._top is not None else self.request.sampler.top

    def take_prompt(self, start: int, logits: NDArray[np.float32]) -> None:
        """Score the prompt's tokens after position ``start`` from the logits [N,V] at ``start`` and on."""
        assert self._top is not None
        targets = self.request.ids[start + 1 : min(start + 1 + len(logits), self.request.prompt_tokens)]
        self.prompt_scores[start + 1 :] = [
            score(line, token, self._top) for line, token in zip(logits, targets, strict=False)
        ]

    def accept(self, logits: Scores) -> None:
        """Choose the next token from logits [V], or the likeliest where they do, and tell of it."""
        request, edited = self.request, logits
        if self._edits:
            assert not isinstance(logits, Likeliest)
            changed = logits.copy()
            for edit in self._edits:
                edit.edit(changed, request.new_ids)
            edited = changed
        before = len(request.text)
        request.accept(edited)
        token = request.ids[-1]
        if request.stop_reason is None:
            for edit in self._edits:
                edit.chosen(token)
        scored = None
        if self._top is not None:
            assert not isinstance(logits, Likeliest)
            scored = score(logits, token, self._top)
        self.listen(Piece(token, request.text[before:], scored))
