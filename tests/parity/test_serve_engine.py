"""The engine on real sessions: many threads, each text as the runner makes it alone."""

from __future__ import annotations

from pathlib import Path
from queue import Queue
from random import Random
from threading import Thread
from typing import Any

import numpy as np
import pytest

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError, UsageError
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.sampling import settings_for
from chai_export.serve import batch as batch_module
from chai_export.serve.engine import ClosedError, QueueFullError
from chai_export.serve.job import End, Event, Piece
from chai_export.serve.model import ServedModel, open_model
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

SHARED: dict[str, Any] = {"heads": 6, "kv_heads": 3, "kept": (2, 1, 2), "sources": (0, 1, 0)}
MODELS = {
    "exact": TinyModel(positions=400),
    "8/4": TinyModel(positions=400, bits=(8, 4)),
    "switch": TinyModel(positions=400, switch=20),
    "shared 4/8": TinyModel(positions=400, **SHARED, bits=((4, 8), (8, 4), (0, 0))),
    "window": TinyModel(positions=400, windows=(0, 9)),
    "windows": TinyModel(positions=400, windows=(20, 7), bits=(8, 4)),
    "window switch": TinyModel(positions=400, windows=(0, 12), switch=20),
}
LENGTH = 8


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    tokenizer = letters_tokenizer()
    return {
        name: model.write(root / str(index), tokenizer=tokenizer, eos=[1]).path
        for index, (name, model) in enumerate(MODELS.items())
    }


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and chunks so short that texts of tens of tokens meet their ends."""
    real = OnnxRuntimeSession.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **{**options, "page_length": LENGTH, "threads": 1})

    monkeypatch.setattr(OnnxRuntimeSession, "__init__", init)
    monkeypatch.setattr(batch_module, "PREFILL_TOKENS", 13)


class Client:
    """A text that is asked for, alone with its expectation."""

    def __init__(self, model: ServedModel, prompt: list[int], new: int, **options: Any) -> None:
        self.events: Queue[Event] = Queue()
        self.prompt, self.new = prompt, new
        self.sampling = {name: options.pop(name) for name in ("temperature", "seed") if name in options}
        settings = settings_for(
            model.manifest.generation, self.sampling.get("temperature", 0.0), seed=self.sampling.get("seed")
        )
        self.job = model.job(prompt, self.events.put, settings, max_new_tokens=new, **options)
        self.text, self.tokens = "", []

    def read(self, most: int = 10**6) -> End | None:
        """Take events up to the end, or so many pieces."""
        for _ in range(most):
            event = self.events.get(timeout=60)
            if isinstance(event, End):
                return event
            self.text += event.text
            self.tokens.append(event.token)
        return None


def alone(runner: ce.Runner, client: Client) -> tuple[list[int], str | None, str]:
    (made,) = runner.generate([client.prompt], max_new_tokens=client.new, **client.sampling)
    return made.token_ids, made.text, made.stop_reason


def prompts(random: Random, count: int) -> list[list[int]]:
    """Half of them begin alike."""
    stem = [random.randrange(4, 39) for _ in range(30)]
    return [
        (stem[: random.randrange(31)] if i % 2 else [])
        + [random.randrange(4, 39) for _ in range(random.randrange(1, 30))]
        for i in range(count)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_many_texts_at_once_are_those_made_alone(implementation, bundles, name):
    """Greedy and seeded, with leavers, in a pool that is far too small for all."""
    random = Random(7)
    page = Bundle.load(bundles[name]).manifest.kv_bytes_per_token() * LENGTH
    buffers, texts = (1, 24) if implementation == "library" else (2, 12)
    memory = 14 * page * buffers
    model = open_model(bundles[name], max_rows=5, max_waiting=40, max_seq=88, cache_memory=memory)
    clients = []
    for number, prompt in enumerate(prompts(random, texts)):
        sampling = {"temperature": 1.0, "seed": number} if number % 3 else {}
        clients.append(Client(model, prompt, random.randrange(1, 40), **sampling))

    def use(client: Client, leaves: bool) -> None:
        model.engine.submit([client.job])
        if leaves and client.read(most=2) is None:
            model.engine.abort([client.job])
            client.read()
        elif not leaves:
            ends.append(client.read())

    ends: list[End | None] = []
    threads = [Thread(target=use, args=(c, i % 4 == 3)) for i, c in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runner = ce.load(bundles[name])
    for number, client in enumerate(clients):
        tokens, text, reason = alone(runner, client)
        if number % 4 == 3:
            assert tokens[: len(client.tokens)] == client.tokens
            continue
        assert client.tokens == tokens
        assert client.text == text
        assert client.job.request.stop_reason == reason
    assert all(end is not None and end.error is None for end in ends)
    counts, (_, held, kept) = model.engine.batch.counts, model.engine.batch.pages
    assert counts.reused_tokens > 0
    assert counts.failed == 0
    assert held == kept
    assert model.engine.open_jobs == 0
    model.engine.close()
    assert model.session.pool.held == 0


@pytest.mark.parametrize("name", MODELS)
def test_reuse_gives_the_text_and_the_scores_of_no_reuse(implementation, bundles, name):
    random = Random(3)
    asked = prompts(random, 10) * 2
    results = []
    for reuse in (False, True):
        model = open_model(bundles[name], max_rows=3, reuse=reuse)
        texts = []
        for prompt in asked:
            client = Client(model, prompt, 12, top=3)
            model.engine.submit([client.job])
            pieces = []
            while isinstance(event := client.events.get(timeout=60), Piece):
                pieces.append(event)
            texts.append(pieces)
        counts = model.engine.batch.counts
        assert (counts.reused_tokens > 100) == reuse
        model.close()
        results.append(texts)
    for without, with_reuse in zip(*results, strict=True):
        assert [p.token for p in without] == [p.token for p in with_reuse]
        for a, b in zip(without, with_reuse, strict=True):
            assert a.score.logprob == pytest.approx(b.score.logprob, abs=1e-4)


def test_scores_of_a_prompt_are_those_of_the_logits(implementation, bundles):
    prompt = list(range(4, 33))
    logits = ce.load(bundles["8/4"]).logits(prompt)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    model = open_model(bundles["8/4"])
    client = Client(model, prompt, 1, top=2, score_prompt=True)
    model.engine.submit([client.job])
    client.read()
    scores = client.job.prompt_scores
    assert scores[0] is None
    assert len(scores) == len(prompt)
    for i, found in enumerate(scores[1:], start=1):
        assert found.token == prompt[i]
        assert found.logprob == pytest.approx(expected[i - 1, prompt[i]], abs=1e-4)
        assert [token for token, _ in found.top] == np.argsort(-expected[i - 1])[:2].tolist()
    model.close()


def test_a_full_queue_and_a_closed_engine_refuse(bundles):
    model = open_model(bundles["exact"], max_rows=1, max_waiting=1)
    first, *others = [Client(model, [5, 9], 300, ignore_eos=True) for _ in range(4)]
    model.engine.submit([first.job])
    first.read(most=1)
    model.engine.submit([others[0].job])
    with pytest.raises(QueueFullError, match="1 texts are waiting already; try again in ") as full:
        model.engine.submit([others[1].job])
    assert 1 <= full.value.retry_after <= 60
    model.engine.abort([first.job, others[0].job])
    assert first.read() == End()
    assert others[0].read() == End()
    model.engine.submit([others[1].job])
    others[1].read(most=1)
    model.close()
    end = others[1].read()
    assert end is not None
    assert "shut down" in str(end.error)
    with pytest.raises(ClosedError):
        model.engine.submit([others[2].job])
    assert not model.engine.alive


def test_what_cannot_be_served_is_one_line(bundles, tmp_path):
    bare = MODELS["exact"].write(tmp_path / "bare").path
    with pytest.raises(ChaiError, match=r"has no tokenizer, and clients send text"):
        open_model(bare)
    with pytest.raises(UsageError, match="--max-rows is 0"):
        open_model(bundles["exact"], max_rows=0)
    with pytest.raises(ChaiError, match=r"no room for one page .*raise --cache-memory"):
        open_model(bundles["exact"], cache_memory=1)
    model = open_model(bundles["exact"], max_seq=10)
    with pytest.raises(ChaiError, match=r"a prompt has 11 tokens and 10 fit; .*--max-seq"):
        Client(model, [5] * 11, 1)
    model.close()
