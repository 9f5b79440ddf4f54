"""``POST /v1/chat/completions``."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chai_export.bundle.tokenizer import encode, render_chat
from chai_export.serve.api.schema import ChatCompletion, Message, ObjectFormat, SchemaFormat
from chai_export.serve.api.scores import TokenTexts, chat_logprobs
from chai_export.serve.api.texts import EventStream, Texts
from chai_export.serve.grammar import Grammars, JsonText
from chai_export.serve.job import Piece
from chai_export.serve.model import ServedModel

_OTHERWISE = "use /v1/completions"


def chat(model: ServedModel) -> APIRouter:
    """The route."""
    router = APIRouter()
    token_texts = TokenTexts(model.tokenizer)
    generation = model.manifest.generation
    grammars = Grammars(model.bundle.path, model.manifest.vocab_size, generation.eos_token_ids)

    @router.post("/v1/chat/completions")
    async def create(body: ChatCompletion, request: Request) -> Response:
        ids = await run_in_threadpool(_prompt, model, body)
        grammar = _grammar(grammars, body)
        if grammar is not None:
            await run_in_threadpool(grammar)  # before there is a stream, and it may take a second
        answer = _Answer(model, body, ids, token_texts, grammar)
        answer.texts.start()
        if body.stream:
            return EventStream(answer.lines(), answer.texts)
        await answer.texts.finish(request)
        return JSONResponse(answer.whole())

    return router


def _prompt(model: ServedModel, body: ChatCompletion) -> list[int]:
    tools = body.tools if body.tool_choice != "none" else None
    turns = [_turn(message) for message in body.messages]
    text = render_chat(model.tokenizer, turns, tools=tools or None, otherwise=_OTHERWISE)
    return encode(model.tokenizer, text, add_special_tokens=False)


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates want it: content as one text, arguments of calls as an object."""
    turn = message.model_dump(exclude_none=True)
    content = message.content
    turn["content"] = content if isinstance(content, str) else "".join(part.text for part in content or ())
    for call in turn.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:  # the template gets the text
                continue
    return turn


def _grammar(grammars: Grammars, body: ChatCompletion) -> Callable[[], JsonText] | None:
    wanted = body.response_format
    if isinstance(wanted, SchemaFormat):
        schema = wanted.json_schema.schema_
        return lambda: grammars.json(schema)
    return (lambda: grammars.json(None)) if isinstance(wanted, ObjectFormat) else None


class _Answer:
    """What is sent of the texts of one request."""

    def __init__(
        self,
        model: ServedModel,
        body: ChatCompletion,
        ids: list[int],
        token_texts: TokenTexts,
        grammar: Callable[[], JsonText] | None,
    ) -> None:
        self._body = body
        self._token_texts = token_texts
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }
        self.texts = Texts(
            model,
            body,
            [ids],
            max_new_tokens=body.max_completion_tokens or body.max_tokens,
            top=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar,
        )

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._scores(choice.pieces),
                "finish_reason": choice.finish,
            }
            for choice in self.texts.choices
        ]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self.texts.usage()}

    async def lines(self) -> AsyncIterator[str]:
        """The answer as it comes, in chunks of JSON."""
        for choice in self.texts.choices:
            yield self._line(choice.index, {"role": "assistant", "content": ""})
        async for choice, piece in self.texts.events():
            if piece is None:
                yield self._line(choice.index, {}, finish=choice.finish)
            elif piece.text or piece.score:
                yield self._line(choice.index, {"content": piece.text}, self._scores([piece]))
        if self._body.include_usage:
            yield self._chunk([], self.texts.usage())

    def _line(
        self,
        index: int,
        delta: dict[str, Any],
        scores: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> str:
        return self._chunk([{"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}])

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        if usage is None and self._body.usage_in_chunks:
            usage = self.texts.usage()
        extra = {"usage": usage} if usage is not None or self._body.include_usage else {}
        head = {**self._head, "object": "chat.completion.chunk"}
        return json.dumps({**head, "choices": choices, **extra}, ensure_ascii=False)

    def _scores(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs([piece.score for piece in pieces if piece.score], self._token_texts)
