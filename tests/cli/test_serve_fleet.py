"""Replicas on Ray Serve: one of them is killed under load, and the rest goes on."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="needs chai-export[ray]")
pytest.importorskip("fastapi", reason="needs chai-export[serve]")

import chai_export as ce
from tests.helpers.served import Served, serving
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

pytestmark = pytest.mark.slow


def ask(server: Served, prompt: str) -> str | None:
    """The text, or None if the replica that made it was killed."""
    body = json.dumps({"prompt": prompt, "max_tokens": 20, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.load(answer)["choices"][0]["text"])
    except (urllib.error.HTTPError, ConnectionError):
        return None


def replicas(server: Served) -> list[psutil.Process]:
    processes = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in processes if "ServeReplica" in " ".join(process.cmdline())]


def test_a_replica_that_is_killed_is_replaced_and_the_others_go_on(tmp_path: Path) -> None:
    model = TinyModel(positions=400, bits=(8, 4))
    bundle = model.write(tmp_path / "tiny", tokenizer=letters_tokenizer()).path
    prompts = ["hello", "what is it", "why"]
    expected = {prompt: ce.load(bundle).generate([prompt], 20)[0].text for prompt in prompts}
    with serving(bundle, "--ray", "--replicas", "2", "--max-rows", "4") as server:
        assert server.facts["replicas"] == 2
        assert {prompt: ask(server, prompt) for prompt in prompts} == expected
        (victim, other) = replicas(server)
        stop, answers = threading.Event(), []

        def load(prompt: str) -> None:
            while not stop.is_set():
                answers.append((prompt, ask(server, prompt)))

        threads = [threading.Thread(target=load, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        victim.kill()
        seen, end = len(answers), time.monotonic() + 240
        server.until(lambda: len(answers) > seen + 30, 240)
        while len(replicas(server)) < 2:
            assert time.monotonic() < end
            time.sleep(0.2)
        stop.set()
        for thread in threads:
            thread.join()
        assert other.is_running()
        lost = [text for _, text in answers if text is None]
        assert len(lost) < len(answers) / 2
        assert all(text in (None, expected[prompt]) for prompt, text in answers)
        assert {prompt: ask(server, prompt) for prompt in prompts} == expected


def cached_tokens(server: Served, prompt: str, session: str) -> int:
    body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", "x-session-id": session}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return int(json.load(answer)["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_session_finds_its_beginning_in_the_replica_that_has_it(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve.experimental.consistent_hash_router", reason="a Ray that has no sessions")
    model = TinyModel(positions=400, bits=(8, 4))
    bundle = model.write(tmp_path / "tiny", tokenizer=letters_tokenizer()).path
    with serving(bundle, "--ray", "--replicas", "2", "--by-session") as server:
        for letter in "abcdefgh":
            prompt = f"{letter} what is it that this long question asks of you"
            first, *others = (cached_tokens(server, prompt, f"session {letter}") for _ in range(4))
            assert first < len(prompt) // 2
            # By load alone half of them would go to the replica that has never seen it.
            assert all(tokens > len(prompt) // 2 for tokens in others)


def test_ray_is_told_of_an_engine_that_has_ended(tmp_path: Path) -> None:
    from chai_export.errors import ChaiError
    from chai_export.serve.api import replica

    bundle = TinyModel(positions=400).write(tmp_path / "tiny", tokenizer=letters_tokenizer()).path
    app = replica.replica_app(str(bundle), [], max_rows=1)
    assert app.routes
    replica.require_alive()
    (model,) = replica._served
    model.close()
    with pytest.raises(ChaiError, match="the engine has ended"):
        replica.require_alive()
    replica._served.clear()
