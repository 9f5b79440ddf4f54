"""What stands in front of every request: its key, and limits on the body's size and on the time it takes."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

import anyio
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chai_export.errors import ChaiError
from chai_export.files import read_text
from chai_export.serve.api.errors import ApiError

MOST_BYTES = 8 << 20
"""Of a body: a prompt of a million token ids takes about 7 MB."""
BODY_SECONDS = 30.0


def read_keys(path: Path) -> list[str]:
    """API keys of a file: one a line; empty lines and those that begin with # are passed over.

    Raises:
        ChaiError: the file cannot be read, or holds no key.
    """
    lines = (line.strip() for line in read_text(path, fix="check --api-key-file").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ChaiError(f"{path} holds no key; write one a line")
    return keys


class Guards:
    """ASGI middleware. Without ``keys`` nobody needs one; addresses outside /v1/ never do."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str] = (),
        most_bytes: int = MOST_BYTES,
        seconds: float = BODY_SECONDS,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._most_bytes = most_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body bounded, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body = _Body(receive, self._most_bytes, self._seconds)
        if self._keys and scope["path"].startswith("/v1/") and not self._knows(headers):
            refusal = ApiError(
                401,
                "no valid API key; send one as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, body.receive, send)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, and each in constant time.
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(found)


class _Body:
    """The messages of one request. What is too large is read on for a while: its sender listens only then."""

    def __init__(self, receive: Receive, most_bytes: int, seconds: float) -> None:
        self._receive = receive
        self._most = most_bytes
        self._seconds = seconds
        self._until: float | None = None
        self._size = 0
        self._complete = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            HTTPException: 413, the body is too large; 408, it takes too long.
        """
        if self._complete:
            return await self._receive()
        message = await self._next()
        while self._size > self._most:
            if self._complete or message["type"] != "http.request" or self._size > 16 * self._most:
                raise HTTPException(413, f"the body is larger than {self._most} bytes; send less at once")
            message = await self._next()
        return message

    async def _next(self) -> Message:
        if self._until is None:
            self._until = anyio.current_time() + self._seconds
        try:
            with anyio.fail_after(max(0.0, self._until - anyio.current_time())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body took longer than {self._seconds:g} s") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        else:
            self._complete = True
        return message
