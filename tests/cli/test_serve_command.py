"""`chai-export serve`: what it does not start with, and what clients can do to it without harm to others."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs chai-export[serve]")
pytest.importorskip("uvicorn", reason="needs chai-export[serve]")
pytest.importorskip("prometheus_client", reason="needs chai-export[serve]")

import httpx
from starlette.exceptions import HTTPException

from chai_export.serve.api.guards import Guards
from tests.helpers.served import Served, serving
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

MODEL = TinyModel(positions=20000, bits=(8, 4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("served") / "tiny", tokenizer=letters_tokenizer()).path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("# ours\n\n first-key \nsecond\n")
    return path


@pytest.fixture(scope="module")
def server(tiny: Path, keys: Path) -> Iterator[Served]:
    with serving(tiny, "--max-rows", "2", "--max-waiting", "3", "--api-key-file", str(keys)) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[Any]:
    headers = {"Authorization": "Bearer second"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


def completed(client: Any, **body: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 3, **body})


def refused(answer: Any, status: int) -> Any:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# Starting


def test_what_it_cannot_start_with_is_one_line(command, tiny, tmp_path):
    bare = MODEL.write(tmp_path / "bare").path
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = command("serve", tiny, "--port", port)
        assert outcome.code == 1
        assert outcome.err.startswith(f"error: 127.0.0.1 port {port} cannot be listened to (")
        assert "choose another --port" in outcome.err
    for code, message, *options in (
        (1, "has no tokenizer, and clients send text", bare, "--port", 0),
        (1, "is not a bundle", tmp_path, "--port", 0),
        (1, "check --api-key-file", tiny, "--port", 0, "--api-key-file", tmp_path / "none"),
        (1, "--host nowhere.invalid is no address", tiny, "--host", "nowhere.invalid"),
        (2, "--port is 70000; give 0 to 65535", tiny, "--port", 70000),
        (2, "--replicas are started by Ray; give --ray too", tiny, "--port", 0, "--replicas", 2),
        (2, "--by-session is for replicas; give --ray too", tiny, "--port", 0, "--by-session"),
        (2, "--max-rows is 0", tiny, "--port", 0, "--max-rows", 0),
        (2, "--max-waiting is -1", tiny, "--port", 0, "--max-waiting", -1),
        (2, "--cache-memory", tiny, "--port", 0, "--cache-memory", "many"),
    ):
        outcome = command("serve", *options)
        assert outcome.code == code
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert message in outcome.err
    (tmp_path / "empty").write_text("# nothing\n")
    assert "holds no key" in command("serve", tiny, "--api-key-file", tmp_path / "empty").err


def test_a_missing_package_names_the_extra(command, tiny, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("chai_export.serve.api")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    outcome = command("serve", tiny, "--port", 0)
    assert outcome.code == 1
    assert outcome.err == (
        "error: serving needs fastapi, which is not installed; pip install 'chai-export[serve]'\n"
    )


# Ending


def test_a_signal_lets_running_texts_finish(tiny):
    body = {"prompt": "hello", "max_tokens": 1500, "stream": True, "temperature": 0}
    with serving(tiny) as served, httpx.Client(base_url=served.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            served.process.send_signal(signal.SIGTERM)
            chunks = [first, *lines]
        chunks = [json.loads(line[6:]) for line in chunks if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert served.process.wait(timeout=60) == 0
        assert served.process.stderr is not None
        log = served.process.stderr.read()
        assert "running texts are finished" in log
        assert log.endswith("ended\n")
        assert "Traceback" not in log
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def test_a_second_signal_cuts_texts_off(tiny):
    body = {"prompt": "hello", "max_tokens": 1900, "stream": True, "logprobs": 20}
    with (
        serving(tiny) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGINT)
        assert served.process.stderr is not None
        while "once more cuts them off" not in served.process.stderr.readline():
            pass
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=60) == 0


# Keys


def test_a_key_of_the_file_opens_v1_and_nothing_else_needs_one(server, client):
    for key in ("first-key", "second"):
        assert completed(client, max_tokens=1).status_code == 200
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"bearer {key}"})
        assert answer.status_code == 200
    for sent in (None, "Bearer", "Bearer secon", "second", "Basic second", "Bearer # ours"):
        headers = {} if sent is None else {"Authorization": sent}
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers=headers)
        assert refused(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200


def test_it_runs_without_torch(server, client):
    assert completed(client).status_code == 200
    loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "tokenizers" in loaded
    assert "libtorch" not in loaded


# Bodies


def test_bodies_that_are_wrong_are_told_why(client):
    for body, message, param in (
        ({"prompt": "x", "frobnicate": 1}, "frobnicate is not a field", "frobnicate"),
        ({"prompt": "x", "stream_options": {"x": 1}}, "stream_options.x is not a field", "stream_options"),
        ({}, "prompt: Field required", "prompt"),
        ({"prompt": []}, "prompt", "prompt"),
        ({"prompt": ""}, "a prompt is empty", None),
        ({"prompt": [99]}, "token id 99 is not in the model's vocabulary of 40", None),
        ({"prompt": [-1]}, "token id -1", None),
        ({"prompt": "\ud800"}, "half of a surrogate pair", None),
        ({"prompt": "x", "n": 10**9}, "n: Input should be less than or equal to 128", "n"),
        ({"prompt": "x", "n": 128}, "128 texts at once are more than this server takes (5)", "n"),
        ({"prompt": "x", "n": "2"}, "n: ", "n"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens", "max_tokens"),
        ({"prompt": "x", "temperature": 3}, "temperature", "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p", "top_p"),
        ({"prompt": "x", "top_k": -3}, "top_k", "top_k"),
        ({"prompt": "x", "seed": 2**70}, "seed", "seed"),
        ({"prompt": "x", "stop": ""}, "stop", "stop"),
        ({"prompt": "x", "best_of": 2}, "best_of other than n", None),
        ({"prompt": "x", "suffix": "y"}, "suffix", "suffix"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, "no token id of the model", "logit_bias"),
        ({"prompt": "x", "logit_bias": {"9" * 5000: 1}}, "no token id of the model", "logit_bias"),
        ({"prompt": [4] * 20001}, "a prompt has 20001 tokens and 20000 fit", None),
        ({"prompt": "x", "model": "\ud800"}, "there is no model", None),
    ):
        content = json.dumps(body).encode()
        answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        error = refused(answer, 404 if "model" in body else 400)
        assert message in error["message"]
        if param is not None:
            assert error["param"] == param
    for content, message in (
        (b"{", "the body is not JSON"),
        (b"", "the body"),
        (b"\xff\xfe", "body"),
        (b"[1]", "the body is no JSON object"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b"[" * 100_000, "body"),
    ):
        answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert message in refused(answer, 400)["message"]
    # What a page in a browser could send without being asked for leave.
    plain = {"Content-Type": "text/plain"}
    answer = client.post("/v1/completions", content=b'{"prompt": "x"}', headers=plain)
    assert "Content-Type: application/json" in refused(answer, 400)["message"]


def test_chats_that_are_wrong_are_told_why(client):
    turn = {"role": "user", "content": "x"}
    for body, message in (
        ({"messages": []}, "messages"),
        ({"messages": [turn]}, "the bundle's tokenizer has no chat template; use /v1/completions"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0"),
        ({"messages": [turn], "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"messages": [turn], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [turn], "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": [turn], "response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"messages": [turn], "functions": []}, "functions is not a field"),
    ):
        assert message in refused(client.post("/v1/chat/completions", json=body), 400)["message"]


def test_addresses_and_methods_that_are_not_there_are_told_so(client):
    assert "docs/serving.md" in refused(client.get("/v1/nothing"), 404)["message"]
    assert "another method" in refused(client.get("/v1/completions"), 405)["message"]
    for path in ("/docs", "/redoc", "/openapi.json"):
        refused(client.get(path), 404)


def test_a_body_of_10_mb_is_refused(client):
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert "larger than 8388608 bytes" in refused(answer, 413)["message"]
    assert completed(client).status_code == 200


def test_a_body_that_takes_too_long_is_refused():
    async def slow() -> Any:
        await asyncio.sleep(3600)

    seen: list[HTTPException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except HTTPException as error:
            seen.append(error)

    guards = Guards(app, seconds=0.01)
    asyncio.run(guards({"type": "http", "headers": [], "path": "/v1/models"}, slow, slow))
    assert [error.status_code for error in seen] == [408]


# Company


def test_a_full_queue_sends_clients_away_and_the_rest_goes_on(server, client):
    body = {"prompt": "hello", "max_tokens": 19000, "stream": True, "n": 5}
    with client.stream("POST", "/v1/completions", json=body) as first:
        lines = first.iter_lines()  # kept: httpx closes the stream with it
        next(lines)
        answer = completed(client)
        error = refused(answer, 429)
        assert error["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        refused(completed(client, stream=True), 429)
    server.until(server.idle)
    assert completed(client).status_code == 200


def request_bytes(server: Served, body: bytes, length: int | None = None) -> bytes:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {server.url[7:]}\r\nAuthorization: Bearer second\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def test_clients_that_neither_read_nor_write_disturb_nobody(server, client):
    """One never reads its megabytes, one stops in its head, one in its body."""
    body = json.dumps({"prompt": "hello", "max_tokens": 1900, "stream": True, "logprobs": 20}).encode()
    expected = completed(client, temperature=0, max_tokens=50).json()["choices"][0]["text"]
    before = server.metric("chai_texts_total")
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", server.port))
    deaf.sendall(request_bytes(server, body))
    in_head = socket.create_connection(("127.0.0.1", server.port))
    in_head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthor")
    in_body = socket.create_connection(("127.0.0.1", server.port))
    in_body.sendall(request_bytes(server, body[:10], len(body)))
    for _ in range(5):
        answer = completed(client, temperature=0, max_tokens=50)
        assert answer.json()["choices"][0]["text"] == expected
    # The text that nobody reads is made to its end and gives its row back.
    server.until(lambda: server.metric("chai_texts_total") == before + 6)
    server.until(server.idle)
    for connection in (deaf, in_head, in_body):
        connection.close()
    assert completed(client).status_code == 200
    assert json.loads(server.get("/health")) == {"status": "ok"}
