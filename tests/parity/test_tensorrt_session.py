"""The TensorRT session on an engine that ONNX Runtime plays: bindings, profiles, pages and graphs.

What this cannot show is that TensorRT and a GPU do the same; no GPU has run the session yet.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError
from chai_export.runtime import tensorrt_session
from chai_export.runtime.runner import Runner, load
from chai_export.runtime.tensorrt_device import CudaDevice
from chai_export.runtime.tensorrt_session import TensorRtSession
from tests.helpers.fake_tensorrt import TENSORRT, FakeEngine, HostDevice
from tests.helpers.tiny_graph import TinyModel

GROUPED: dict[str, Any] = {"heads": 6, "kv_heads": 3, "kept": (1, 2), "head_dim": 4, "value_dim": 8}
MODELS = {
    "mha": TinyModel(positions=400),
    "gqa": TinyModel(positions=400, **GROUPED),
    "8/4": TinyModel(positions=400, bits=(8, 4)),
    "mixed": TinyModel(positions=400, bits=((4, 16), (0, 8)), **GROUPED),
}
PROMPTS = [[5, 9], [7, 8, 20, 21, 6, 30], list(range(4, 33))]
TOLERANCE = 1e-4
MAX_BATCH, MAX_SEQ, PAGE = 3, 300, 8


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: model.write(root / name) for name, model in MODELS.items()}


class Opened:
    """A runner on the fake engine, and what it is made of."""

    def __init__(self, bundle: Bundle, heads: str = "chai", memory: int = 1 << 30, **options: Any) -> None:
        self.engine = FakeEngine(bundle, MAX_BATCH, MAX_SEQ, PAGE)
        self.device = HostDevice(memory)
        self.session = TensorRtSession(
            bundle.manifest,
            heads,
            self.engine,
            tensorrt=TENSORRT,
            device=self.device,  # type: ignore[arg-type]
            **options,
        )
        self.runner = Runner(bundle, self.session, "tensorrt", heads, max_batch=MAX_BATCH)


@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_and_head_maps_are_those_of_the_reference(bundles, name, heads):
    opened = Opened(bundles[name], heads)
    for prompt in PROMPTS:
        logits, maps = MODELS[name].reference(prompt, heads)
        np.testing.assert_allclose(opened.runner.logits(prompt), logits, atol=TOLERANCE)
        np.testing.assert_array_equal(opened.runner.head_maps, maps)


@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_batch_generates_what_each_prompt_generates_alone(bundles, name, heads):
    opened = Opened(bundles[name], heads)
    results = opened.runner.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == MODELS[name].greedy(prompt, 20, heads)


def test_chunks_and_single_tokens_give_the_logits_of_one_prefill(bundles):
    opened = Opened(bundles["mha"])
    prompt = PROMPTS[2]
    whole = opened.runner.logits(prompt)
    for chunks in ([5, 24], [6, 1, 1, 21], [5, *[1] * 24]):
        np.testing.assert_allclose(opened.runner.logits(prompt, chunks=chunks), whole, atol=TOLERANCE)


def test_decode_runs_in_one_graph_until_the_page_table_doubles(bundles):
    opened = Opened(bundles["mha"])
    # 6 to 16 tokens: one page, then two.
    opened.runner.generate([PROMPTS[1]], max_new_tokens=11, ignore_eos=True)
    prefill, first, second = opened.engine.contexts
    assert prefill.executed == 1
    assert (first.executed, second.executed) == (2, 8)
    assert opened.device.captured == 2
    assert opened.device.replayed == 10 - 2  # the first step of either is outside its graph
    tensors = opened.engine.num_io_tensors
    assert first.bound == second.bound == tensors
    wanted = MODELS["mha"].greedy(PROMPTS[1], 40)
    assert opened.runner.generate([PROMPTS[1]], max_new_tokens=40, ignore_eos=True)[0].token_ids == wanted
    assert opened.session.pool.touched == 6
    # 1, 2, 4 and 8 pages; contexts of the batch before are used again, their graphs are not.
    assert len(opened.engine.contexts) == 1 + 4
    assert opened.device.captured == 2 + 4


def test_a_call_has_the_rows_that_have_work(bundles):
    opened = Opened(bundles["8/4"])
    opened.runner.generate([PROMPTS[1], PROMPTS[2]], max_new_tokens=3, ignore_eos=True)
    # Prompts of unlike lengths are calls of their own; then both decode.
    assert opened.engine.calls == [(1, 6), (1, 29), (2, 1), (2, 1)]


def test_the_graphs_that_were_used_last_stay(bundles, monkeypatch):
    monkeypatch.setattr(tensorrt_session, "MOST_GRAPHS", 2)
    opened = Opened(bundles["mha"])
    wanted = MODELS["mha"].greedy(PROMPTS[1], 40)
    assert opened.runner.generate([PROMPTS[1]], max_new_tokens=40, ignore_eos=True)[0].token_ids == wanted
    assert len(opened.engine.contexts) == 1 + 2


def test_rows_that_find_no_pages_wait(bundles):
    per_token = bundles["8/4"].manifest.kv_bytes_per_token("chai")
    opened = Opened(bundles["8/4"], cache_memory=6 * PAGE * per_token)
    results = opened.runner.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == MODELS["8/4"].greedy(prompt, 12)
    assert opened.session.pool.pages == 6
    assert opened.session.cache_bytes == 6 * PAGE * per_token
    with pytest.raises(ChaiError, match=r"49 tokens and 48 fit; shorten it or raise --cache-memory"):
        opened.runner.generate([[4] * 49])


def test_free_gpu_memory_bounds_the_pool(bundles):
    opened = Opened(bundles["mha"], memory=4000)
    with pytest.raises(ChaiError, match=r"shorten it or free GPU memory \(3.9 KiB are free\)"):
        opened.runner.generate([PROMPTS[2] * 3])


def test_a_pool_is_one_buffer_that_a_batch_keeps(bundles):
    session = Opened(bundles["gqa"]).session
    session.start(2, 11)
    assert session.cache_bytes == 11 * PAGE * bundles["gqa"].manifest.kv_bytes_per_token("chai")
    session.drop()
    assert session.cache_bytes == 0


def test_half_precision_logits_come_back_as_float32(tmp_path: Path):
    model = TinyModel(dtype="float16")
    opened = Opened(model.write(tmp_path / "half"))
    logits = opened.runner.logits(PROMPTS[1])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, model.reference(PROMPTS[1])[0], atol=5e-2)


def test_a_shape_outside_the_profile_says_what_to_build(bundles):
    session = Opened(bundles["mha"]).session
    rows = MAX_BATCH + 1
    session.begin(rows, 64)
    with pytest.raises(ChaiError, match="build it with a higher --max-batch"):
        session.step(
            np.zeros((rows, 2), np.int64),
            np.full(rows, 2, np.int32),
            np.zeros(rows, np.int32),
            np.zeros((rows, 1), np.int64),
        )


def test_an_engine_of_another_model_is_refused(bundles, tmp_path: Path):
    engine = FakeEngine(bundles["mha"], MAX_BATCH, MAX_SEQ, PAGE)
    for number, (model, difference) in enumerate(
        (
            (TinyModel(kept=(2, 3, 1)), r"it lacks past_key\.2"),
            (TinyModel(dtype="float16"), r"past_key\.0 is float32 .* should be float16"),
            (TinyModel(vocab=41), r"logits is float32 \[None, None, 40\] and should be float32"),
        )
    ):
        other = model.write(tmp_path / f"other{number}").manifest
        with pytest.raises(ChaiError, match=f"the engine is of another model: {difference}"):
            TensorRtSession(
                other,
                "chai",
                engine,
                tensorrt=TENSORRT,
                device=HostDevice(),  # type: ignore[arg-type]
            )


def test_both_contexts_share_one_scratch_buffer(bundles):
    prefill, decode = Opened(bundles["mha"]).engine.contexts
    assert prefill.memory == decode.memory
    assert prefill.memory[0] != 0


def test_other_threads_may_allocate_while_a_graph_is_captured(monkeypatch):
    captures = []

    @contextlib.contextmanager
    def graph(graph, **settings):
        captures.append(settings)
        yield

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    work = []
    assert CudaDevice().capture(lambda: work.append("done"))() == "replayed"
    assert work == ["done"]
    assert captures == [{"stream": stream, "capture_error_mode": "thread_local"}]


@pytest.mark.parametrize(
    ("sampling", "whole"),
    [
        ({}, 0),
        ({"temperature": 1.0, "top_k": 5, "seed": 3}, 0),
        ({"temperature": 1.0, "top_k": 0, "seed": 3}, 12),
        ({"repetition_penalty": 1.3}, 12),
    ],
    ids=str,
)
def test_logits_come_to_the_host_where_the_likeliest_do_not_decide(bundles, sampling, whole, monkeypatch):
    """Texts are those of ONNX Runtime, whatever travels."""
    steps: list[int] = []
    real = TensorRtSession.step

    def step(self: TensorRtSession, *arguments: Any, **options: Any) -> Any:
        steps.append(1)
        return real(self, *arguments, **options)

    asked: list[int] = []
    monkeypatch.setattr(TensorRtSession, "step", step)
    row = TensorRtSession._whole_row
    monkeypatch.setattr(
        TensorRtSession, "_whole_row", lambda self, line: (asked.append(line), row(self, line))[1]
    )
    opened = Opened(bundles["8/4"])
    options = {"max_new_tokens": 12, "ignore_eos": True, **sampling}
    (made,) = opened.runner.generate([PROMPTS[1]], **options)
    (wanted,) = load(bundles["8/4"].path).generate([PROMPTS[1]], **options)
    assert made.token_ids == wanted.token_ids
    assert len(steps) == whole
    assert not asked
    opened.session.begin(2, 64)
    ids = np.array([PROMPTS[1], PROMPTS[1][::-1]], np.int64)
    lengths = np.full(2, 6, np.int32)
    best = opened.session.step_top(3, ids, lengths, np.zeros(2, np.int32), np.full((2, 1), 5, np.int64))
    opened.session.begin(2, 64)
    logits = opened.session.step(ids, lengths, np.zeros(2, np.int32), np.full((2, 1), 5, np.int64))[:, 0]
    for each, line in zip(best, logits, strict=True):
        np.testing.assert_array_equal(each.tokens, np.argsort(-line)[:3])
        np.testing.assert_array_equal(each.logits, np.sort(line)[::-1][:3])


def test_all_logits_can_be_had_until_the_next_step(bundles):
    session = Opened(bundles["mha"]).session
    session.begin(2, 64)
    ids = np.array([PROMPTS[1], PROMPTS[1][::-1]], np.int64)
    arguments = (ids, np.full(2, 6, np.int32), np.zeros(2, np.int32), np.full((2, 1), 5, np.int64))
    best = session.step_top(3, *arguments)
    every = [each.every() for each in best]
    session.begin(2, 64)
    np.testing.assert_array_equal(every, session.step(*arguments)[:, 0])
