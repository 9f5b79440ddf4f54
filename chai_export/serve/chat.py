"""A conversation with a served model: each question brings the whole history, which the cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import Queue

from chai_export.bundle.tokenizer import encode, render_chat
from chai_export.runtime.sampling import SamplingSettings
from chai_export.runtime.stopping import StopReason
from chai_export.serve.job import End, Event, Job
from chai_export.serve.model import ServedModel
from chai_export.units import bytes_text

_OTHERWISE = "use `chai-export run`"


@dataclass(frozen=True)
class Turn:
    """A question with its answer. ``stop_reason`` is None if the answer was interrupted; times are in ms."""

    question: str
    text: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    stop_reason: StopReason | None
    ttft_ms: float
    tpot_ms: float


class Conversation:
    """Turns of a user and the model.

    Args:
        model: whose engine runs.
        settings: how tokens are chosen.
        system: what the model is told before the first turn.
        max_new_tokens: of an answer.

    Raises:
        ChaiError: the bundle has no chat template, or one that fails.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: SamplingSettings,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self._max_new_tokens = max_new_tokens
        self.turns: list[Turn] = []
        self._messages = self._begin.copy()
        self._render("")

    def reset(self) -> None:
        """Forget all turns."""
        self._messages = self._begin.copy()
        self.turns = []

    def ask(self, question: str, show: Callable[[str], None]) -> Turn:
        """The answer to ``question``; ``show`` is given its text as it comes.

        An interruption (KeyboardInterrupt) ends the answer, is raised again, and leaves what was shown in
        the history.

        Raises:
            ChaiError: the history is too long, or the answer failed; the question is not in the history then.
        """
        ids = self._render(question)
        events: Queue[Event] = Queue()
        job = self._model.job(ids, events.put, self._settings, max_new_tokens=self._max_new_tokens)
        self._model.engine.submit([job])
        text = ""
        try:
            while not isinstance(event := events.get(), End):
                text += event.text
                if event.text:
                    show(event.text)
        except BaseException:
            self._model.engine.abort([job])
            while not isinstance(events.get(), End):
                pass
            self._keep(job, question, text)
            raise
        if event.error is not None:
            raise event.error
        return self._keep(job, question, text)

    def stats(self) -> str:
        """One line about the turns and the cache."""
        if not self.turns:
            return "nothing was asked yet"
        last, made = self.turns[-1], sum(turn.new_tokens for turn in self.turns)
        _, held, _ = self._model.engine.batch.pages
        session = self._model.session
        return (
            f"{len(self.turns)} turns, {made} tokens made; last: {last.prompt_tokens} tokens of history of "
            f"which the cache had {last.cached_tokens}, first token {last.ttft_ms:.0f} ms, then "
            f"{last.tpot_ms:.1f} ms per token; cache of {held * session.page_length} tokens, "
            f"{bytes_text(session.held_bytes)}"
        )

    def _render(self, question: str) -> list[int]:
        turns = [*self._messages, {"role": "user", "content": question}]
        tokenizer = self._model.tokenizer
        return encode(
            tokenizer, render_chat(tokenizer, turns, otherwise=_OTHERWISE), add_special_tokens=False
        )

    def _keep(self, job: Job, question: str, text: str) -> Turn:
        times, request = job.request.token_times, job.request
        turn = Turn(
            question,
            text,
            request.prompt_tokens,
            job.reused_tokens or 0,
            len(request.new_ids),
            request.stop_reason,
            1e3 * (times[0] - job.submitted) if times else 0.0,
            1e3 * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0,
        )
        self.turns.append(turn)
        self._messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        return turn
