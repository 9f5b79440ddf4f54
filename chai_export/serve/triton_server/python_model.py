"""What the server's Python back end runs: requests become jobs of our engine, tokens become responses.

All requests of an instance share one engine, so one cache. ``execute`` only hands jobs over; a thread sends
what the engine makes, since a response goes to another process, and asks which requests were cancelled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from chai_export.bundle.choices import Backend
from chai_export.errors import ChaiError, UsageError, reason
from chai_export.progress import note
from chai_export.runtime.prompts import encode_prompt, require_stops_possible
from chai_export.runtime.sampling import settings_for
from chai_export.serve.engine import ClosedError, QueueFullError
from chai_export.serve.job import End, Event, Job, Piece
from chai_export.serve.model import open_model
from chai_export.serve.triton_server import tensors
from chai_export.serve.triton_server.settings import Settings
from chai_export.serve.triton_server.tensors import Given

BUNDLE = "bundle"
"""The bundle's directory in that of a version of the model."""
POLL_SECONDS = 0.1
"""How often the server is asked which requests were cancelled."""


class PythonModel:
    """One instance of the model.

    Args:
        server: the module ``triton_python_backend_utils``.
        arguments: what the server gives ``initialize``.

    Raises:
        ChaiError: the bundle cannot be served here.
    """

    def __init__(self, server: Any, arguments: Mapping[str, str]) -> None:
        self._server = server
        settings = Settings.of_config(json.loads(arguments["model_config"]))
        if settings.backend is Backend.TENSORRT:
            import torch

            torch.cuda.set_device(int(arguments["model_instance_device_id"]))
        bundle = Path(arguments["model_repository"]) / arguments["model_version"] / BUNDLE
        self._model = open_model(bundle, need_tokenizer=False, **settings.options())
        self._events: Queue[tuple[_Reply, Event] | None] = Queue()
        self._open: set[_Reply] = set()
        self._sending = Thread(target=self._send, name="responses", daemon=True)
        self._sending.start()

    def execute(self, requests: list[Any]) -> None:
        """Begin the texts of some requests; a request that is wrong is answered at once, and alone."""
        for request in requests:
            reply = _Reply(self._server, request.get_response_sender())
            try:
                job = self._job(request, reply)
                self._open.add(reply)
                self._model.engine.submit([job])
            except ChaiError as error:
                self._open.discard(reply)
                reply.fail(str(error), _code(self._server, error))
            except Exception as error:
                self._open.discard(reply)
                note(f"error: a request failed ({reason(error)})")
                reply.fail(f"the request failed ({reason(error)})", self._server.TritonError.INTERNAL)

    def close(self) -> None:
        """End what runs, tell its clients, and give the memory back."""
        self._model.close()
        self._events.put(None)
        self._sending.join()

    def _job(self, request: Any, reply: _Reply) -> Job:
        given, model = Given(self._server, request), self._model
        prompts = [each for each in (given.one(tensors.TEXT), given.many(tensors.IDS)) if each is not None]
        if len(prompts) != 1:
            raise UsageError(f"give either {tensors.TEXT.name} or {tensors.IDS.name}")
        chat = given.one(tensors.CHAT, False)
        prompt = encode_prompt(prompts[0], model.tokenizer, model.manifest.vocab_size, chat=chat)
        stop = given.many(tensors.STOP) or []
        require_stops_possible(stop, model.tokenizer)
        most = given.one(tensors.MAX_TOKENS)
        if most is not None and most < 1:
            raise UsageError(f"{tensors.MAX_TOKENS.name} is {most}; give at least 1")
        settings = settings_for(
            model.manifest.generation,
            given.one(tensors.TEMPERATURE, 0.0),
            given.one(tensors.TOP_K),
            given.one(tensors.TOP_P),
            given.one(tensors.REPETITION_PENALTY),
            given.one(tensors.SEED),
        )
        reply.streams = given.one(tensors.STREAM, False)
        reply.job = model.job(
            prompt,
            lambda event: self._events.put((reply, event)),
            settings,
            max_new_tokens=most,
            stop=stop,
            ignore_eos=given.one(tensors.IGNORE_EOS, False),
        )
        return reply.job

    def _send(self) -> None:
        while True:
            try:
                item = self._events.get(timeout=POLL_SECONDS)
            except Empty:
                self._abort_cancelled()
                continue
            if item is None:
                return
            reply, event = item
            try:
                reply.take(event)
            except Exception as error:  # of the server: the client may have gone
                note(f"error: a response could not be sent ({reason(error)})")
                self._abort(reply)
            if isinstance(event, End):
                self._open.discard(reply)

    def _abort_cancelled(self) -> None:
        for reply in self._open.copy():
            if reply.cancelled():
                self._abort(reply)

    def _abort(self, reply: _Reply) -> None:
        if reply.job is not None:
            self._model.engine.abort([reply.job])


class _Reply:
    """The responses to one request."""

    def __init__(self, server: Any, sender: Any) -> None:
        self._server = server
        self._sender = sender
        self._text, self._tokens = "", list[int]()
        self.job: Job | None = None
        self.streams = False

    def take(self, event: Event) -> None:
        """Send what an event adds, or keep it for the only response."""
        if isinstance(event, Piece):
            self._text += event.text
            self._tokens.append(event.token)
            if self.streams:
                self._respond("", flags=0)
        elif event.error is not None:
            self.fail(str(event.error), _code(self._server, event.error, self._server.TritonError.INTERNAL))
        elif event.reason is None:
            self.fail("the request was cancelled", self._server.TritonError.CANCELLED)
        else:
            self._respond(event.reason, flags=self._server.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, message: str, code: int) -> None:
        """End with an error."""
        response = self._server.InferenceResponse(
            output_tensors=[], error=self._server.TritonError(message, code)
        )
        self._sender.send(response, flags=self._server.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def cancelled(self) -> bool:
        """Whether the client has withdrawn the request."""
        return bool(self._sender.is_cancelled())

    def _respond(self, finish_reason: str, flags: int) -> None:
        content: dict[tensors.Value, list[Any]] = {
            tensors.TEXT_OUTPUT: [self._text],
            tensors.TOKEN_IDS: self._tokens,
            tensors.FINISH_REASON: [finish_reason],
        }
        made = [self._server.Tensor(value.name, value.array(content[value])) for value in tensors.OUTPUTS]
        self._text, self._tokens = "", []
        self._sender.send(self._server.InferenceResponse(output_tensors=made), flags=flags)


def _code(server: Any, error: ChaiError, otherwise: int | None = None) -> int:
    """The server's code for an error; ``otherwise`` if nothing better is known, else a wrong argument."""
    if isinstance(error, (QueueFullError, ClosedError)):
        return int(server.TritonError.UNAVAILABLE)
    return int(server.TritonError.INVALID_ARG) if otherwise is None else otherwise
