"""The texts of one request: jobs of the engine on one side, a stream of events for asyncio on the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from chai_export.runtime.sampling import SamplingSettings, settings_for
from chai_export.runtime.stopping import StopReason
from chai_export.serve.api.errors import ApiError, as_api_error
from chai_export.serve.api.schema import Generating
from chai_export.serve.edits import LogitBias, Penalties
from chai_export.serve.grammar import JsonText
from chai_export.serve.job import Event, Job, LogitsEdit, Piece
from chai_export.serve.model import ServedModel

FINISH = {
    StopReason.EOS: "stop",
    StopReason.STOP: "stop",
    StopReason.LENGTH: "length",
    StopReason.CAPACITY: "length",
}
"""OpenAI's names."""


@dataclass
class Choice:
    """One text as it comes."""

    index: int
    job: Job
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    finish: str | None = None


class Texts:
    """The texts of a request: ``n`` for each prompt, in this order."""

    def __init__(
        self,
        model: ServedModel,
        body: Generating,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int | None,
        top: int | None,
        score_prompt: bool = False,
        grammar: Callable[[], JsonText] | None = None,
    ) -> None:
        self._model = model
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.prompts = prompts
        self.n = body.n
        self.choices: list[Choice] = []
        _require_fields(model, body, len(prompts) * body.n)
        for ids in prompts:
            for number in range(body.n):
                edits: list[LogitsEdit] = [grammar()] if grammar is not None else []
                index = len(self.choices)
                job = model.job(
                    ids,
                    self._listener(index),
                    _settings(model, body, number),
                    max_new_tokens=max_new_tokens,
                    stop=body.stops,
                    ignore_eos=body.ignore_eos,
                    top=top,
                    score_prompt=score_prompt,
                    edits=edits + _edits(body),
                )
                self.choices.append(Choice(index, job))

    def start(self) -> None:
        """Hand the jobs to the engine.

        Raises:
            QueueFullError: there is no place for them now.
            ClosedError: the server is shutting down.
        """
        self._model.engine.submit([choice.job for choice in self.choices])

    def close(self) -> None:
        """End what has not ended."""
        left = [choice.job for choice in self.choices if choice.finish is None]
        if left:
            self._model.engine.abort(left)

    async def events(self) -> AsyncIterator[tuple[Choice, Piece | None]]:
        """Each piece of each text as it comes, and None when a text has ended.

        Raises:
            ApiError: a text failed; the others are ended.
        """
        left = len(self.choices)
        while left:
            index, event = await self._queue.get()
            choice = self.choices[index]
            if isinstance(event, Piece):
                choice.text += event.text
                choice.pieces.append(event)
                yield choice, event
                continue
            left -= 1
            if event.error is not None:
                self.close()
                raise as_api_error(event.error, 500)
            choice.finish = FINISH[event.reason] if event.reason is not None else "abort"
            yield choice, None

    async def finish(self, request: Request) -> None:
        """Wait for all texts, or end them when the client has gone.

        Raises:
            ApiError: a text failed, or nobody is left to answer.
        """

        async def read() -> None:
            async for _ in self.events():
                pass

        async def leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = {asyncio.create_task(read()), asyncio.create_task(leave())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if any(choice.finish is None for choice in self.choices):
                raise ApiError(499, "the client has gone")
        finally:
            self.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def usage(self, hidden: int = 0) -> dict[str, object]:
        """Numbers of tokens; ``hidden`` of each text were made and are not shown."""
        firsts = self.choices[:: self.n]
        prompt = sum(len(ids) for ids in self.prompts)
        made = sum(len(choice.pieces) - hidden for choice in self.choices)
        cached = sum(choice.job.reused_tokens or 0 for choice in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _listener(self, index: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server ended, and its loop with it
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return listen


class EventStream(StreamingResponse):
    """Server-sent events; however the connection ends, what nobody reads is not computed."""

    def __init__(self, lines: AsyncIterator[str], texts: Texts) -> None:
        super().__init__(
            _guarded(lines), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._texts.close()


async def _guarded(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The lines, an error among them if there is one, and the last one."""
    import json

    try:
        async for line in lines:
            yield f"data: {line}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield "data: [DONE]\n\n"


def _settings(model: ServedModel, body: Generating, number: int) -> SamplingSettings:
    """Sampling of the text ``number`` of a prompt; with a seed each has one of its own."""
    seed = None if body.seed is None else (body.seed + number) % 2**63
    return settings_for(
        model.manifest.generation, body.temperature, body.top_k, body.top_p, body.repetition_penalty, seed
    )


def _edits(body: Generating) -> list[LogitsEdit]:
    edits: list[LogitsEdit] = []
    if body.logit_bias:
        edits.append(LogitBias({int(token): value for token, value in body.logit_bias.items()}))
    if body.presence_penalty or body.frequency_penalty:
        edits.append(Penalties(body.presence_penalty, body.frequency_penalty))
    return edits


def _require_fields(model: ServedModel, body: Generating, texts: int) -> None:
    """Raise ApiError where a body is well formed and asks for what there is not."""
    if body.model is not None and body.model != model.name:
        raise ApiError(
            404, f"there is no model {body.model!r}; this server has {model.name!r}", code="model_not_found"
        )
    most = model.engine.rows + model.engine.max_waiting
    if texts > most:
        text = (
            f"{texts} texts at once are more than this server takes ({most}); lower n or send fewer prompts"
        )
        raise ApiError(400, text, param="n")
    for token in body.logit_bias or ():
        if not (token.isascii() and token.isdigit() and int(token[:20]) < model.manifest.vocab_size):
            text = f"logit_bias names {token[:20]!r}, which is no token id of the model"
            raise ApiError(400, text, param="logit_bias")
