"""The socket that a server listens on."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("fastapi", reason="needs chai-export[serve]")

from chai_export.serve.api.server import listen


def send_for_ever(connection: socket.socket) -> None:
    connection.settimeout(60)
    while True:
        connection.send(bytes(1 << 16))


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such limit")
def test_a_client_that_takes_nothing_loses_its_connection():
    with (
        listen("127.0.0.1", 0, stalled_seconds=0.5) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
        pytest.raises(TimeoutError, match="Connection timed out"),
    ):
        send_for_ever(connection)
