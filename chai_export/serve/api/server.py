"""Running the application: a socket, signals, and an end that lets running texts finish."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from chai_export.errors import ChaiError
from chai_export.progress import note

GRACE_SECONDS = 300
"""Texts that still run so long after the server was told to end are cut off."""
STALLED_SECONDS = 60.0
"""A client that takes nothing of what is sent for so long has lost its connection."""


def listen(host: str, port: int, stalled_seconds: float = STALLED_SECONDS) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Connections inherit the limit where the system has it.

    Raises:
        ChaiError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ChaiError(f"--host {host} is no address ({error}); give one of this machine's") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # The server cannot see it: what is sent waits in buffers of the event loop and of the system.
            milliseconds = int(1e3 * stalled_seconds)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ChaiError(
            f"{host} port {port} cannot be listened to ({error.strerror}); choose another --port or --host"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients of this machine find it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; a second one cuts running texts off.

    Args:
        app: the application.
        listener: its socket, which is closed at the end.
        ready: called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    _Server(config, ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn, but a server that was told to end has not failed: the signal is not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        note("ending: running texts are finished, new ones refused; once more cuts them off")
