"""``POST /v1/completions``."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chai_export.runtime.prompts import encode_prompt
from chai_export.serve.api.schema import Completion
from chai_export.serve.api.scores import TokenTexts, completion_logprobs
from chai_export.serve.api.texts import Choice, EventStream, Texts
from chai_export.serve.job import Piece
from chai_export.serve.model import ServedModel


def completions(model: ServedModel) -> APIRouter:
    """The route."""
    router = APIRouter()
    token_texts = TokenTexts(model.tokenizer)

    @router.post("/v1/completions")
    async def create(body: Completion, request: Request) -> Response:
        prompts = body.prompts
        ids = await run_in_threadpool(
            lambda: [
                encode_prompt(
                    prompt, model.tokenizer, model.manifest.vocab_size, chat=False, name=f"prompt {i}"
                )
                for i, prompt in enumerate(prompts)
            ]
        )
        answer = _Answer(model, body, ids, token_texts)
        answer.texts.start()
        if body.stream:
            return EventStream(answer.lines(), answer.texts)
        await answer.texts.finish(request)
        return JSONResponse(answer.whole())

    return router


class _Answer:
    """What is sent of the texts of one request."""

    def __init__(
        self, model: ServedModel, body: Completion, ids: list[list[int]], token_texts: TokenTexts
    ) -> None:
        self._body = body
        self._token_texts = token_texts
        self._tokenizer = model.tokenizer
        self._hidden = int(body.max_tokens == 0)  # one is made, so that the prompt is computed
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self.texts = Texts(
            model,
            body,
            ids,
            max_new_tokens=1 if self._hidden else body.max_tokens,
            top=body.logprobs,
            score_prompt=body.echo,
        )

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(
                choice,
                self._echo(choice) + ("" if self._hidden else choice.text),
                self._scores(choice, choice.pieces[: len(choice.pieces) - self._hidden], first=True),
                choice.finish,
            )
            for choice in self.texts.choices
        ]
        return {**self._head, "choices": choices, "usage": self.texts.usage(self._hidden)}

    async def lines(self) -> AsyncIterator[str]:
        """The answer as it comes, in chunks of JSON."""
        begun: set[int] = set()
        shown: dict[int, int] = {}
        async for choice, piece in self.texts.events():
            first = choice.index not in begun
            begun.add(choice.index)
            pieces = [piece] if piece is not None and not self._hidden else []
            text = (self._echo(choice) if first else "") + "".join(piece.text for piece in pieces)
            scores = self._scores(choice, pieces, first=first, offset=shown.get(choice.index, 0))
            shown[choice.index] = shown.get(choice.index, 0) + _length(scores)
            if text or piece is None or scores:
                yield self._line([self._choice(choice, text, scores, choice.finish)])
        if self._body.include_usage:
            yield self._line([], usage=self.texts.usage(self._hidden))

    def _line(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        if usage is None and self._body.usage_in_chunks:
            usage = self.texts.usage(self._hidden)
        extra = {"usage": usage} if usage is not None or self._body.include_usage else {}
        return json.dumps({**self._head, "choices": choices, **extra}, ensure_ascii=False)

    def _choice(
        self, choice: Choice, text: str, scores: dict[str, Any] | None, finish: str | None
    ) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": scores, "finish_reason": finish}

    def _echo(self, choice: Choice) -> str:
        if not self._body.echo:
            return ""
        prompt = self._body.prompts[choice.index // self.texts.n]
        if isinstance(prompt, str):
            return prompt
        return str(
            self._tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _scores(
        self, choice: Choice, pieces: list[Piece], *, first: bool, offset: int = 0
    ) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        scores = [(piece.token, piece.score) for piece in pieces]
        if first and self._body.echo:
            ids = self.texts.prompts[choice.index // self.texts.n]
            scores = [*zip(ids, choice.job.prompt_scores, strict=True), *scores]
        return completion_logprobs(scores, self._token_texts, offset) if scores or first else None


def _length(scores: dict[str, Any] | None) -> int:
    """Of the text that scored tokens have."""
    return sum(map(len, scores["tokens"])) if scores else 0
