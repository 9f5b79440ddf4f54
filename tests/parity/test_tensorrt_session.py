"""The TensorRT session on an engine that ONNX Runtime plays: bindings, profiles, growth and graphs.

What this cannot show is that TensorRT and a GPU do the same; no GPU has run the session yet.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError
from chai_export.runtime.runner import Runner
from chai_export.runtime.tensorrt_device import CudaDevice
from chai_export.runtime.tensorrt_session import DECODE, PREFILL, TensorRtSession
from tests.helpers.fake_tensorrt import TENSORRT, FakeEngine, HostDevice
from tests.helpers.tiny_graph import TinyModel

MODELS = {
    "mha": TinyModel(positions=400),
    "gqa": TinyModel(heads=6, kv_heads=3, kept=(1, 2), head_dim=4, value_dim=8, positions=400),
}
PROMPTS = [[5, 9], [7, 8, 20, 21, 6, 30], list(range(4, 33))]
TOLERANCE = 1e-4
MAX_BATCH, MAX_SEQ = 3, 300


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: model.write(root / name) for name, model in MODELS.items()}


class Opened:
    """A runner on the fake engine, and what it is made of."""

    def __init__(self, bundle: Bundle, heads: str = "chai", in_place: bool = True) -> None:
        self.engine = FakeEngine(bundle, MAX_BATCH, MAX_SEQ)
        self.device = HostDevice()
        self.session = TensorRtSession(
            bundle.manifest,
            heads,
            self.engine,
            tensorrt=TENSORRT,
            in_place=in_place,
            device=self.device,  # type: ignore[arg-type]
        )
        self.runner = Runner(bundle, self.session, "tensorrt", heads, max_batch=MAX_BATCH)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_and_head_maps_are_those_of_the_reference(bundles, name, heads, in_place):
    opened = Opened(bundles[name], heads, in_place)
    for prompt in PROMPTS:
        logits, maps = MODELS[name].reference(prompt, heads)
        np.testing.assert_allclose(opened.runner.logits(prompt), logits, atol=TOLERANCE)
        np.testing.assert_array_equal(opened.runner.head_maps, maps)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_batch_generates_what_each_prompt_generates_alone(bundles, name, heads, in_place):
    opened = Opened(bundles[name], heads, in_place)
    results = opened.runner.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == MODELS[name].greedy(prompt, 20, heads)


@pytest.mark.parametrize("in_place", [True, False])
def test_chunks_and_single_tokens_give_the_logits_of_one_prefill(bundles, in_place):
    opened = Opened(bundles["mha"], in_place=in_place)
    prompt = PROMPTS[2]
    whole = opened.runner.logits(prompt)
    for chunks in ([5, 24], [6, 1, 1, 21], [5, *[1] * 24]):
        np.testing.assert_allclose(opened.runner.logits(prompt, chunks=chunks), whole, atol=TOLERANCE)


def test_decode_runs_in_one_graph_until_the_caches_grow(bundles):
    opened = Opened(bundles["mha"])
    opened.runner.generate([PROMPTS[1]], max_new_tokens=10, ignore_eos=True)
    prefill, decode = (opened.engine.contexts[i] for i in (PREFILL, DECODE))
    assert prefill.executed == 1
    assert opened.device.captured == 1
    assert opened.device.replayed == 8  # 10 tokens: one from prefill, one outside the graph
    tensors = opened.engine.num_io_tensors
    assert decode.bound == tensors
    wanted = MODELS["mha"].greedy(PROMPTS[1], 130)
    result = opened.runner.generate([PROMPTS[1]], max_new_tokens=130, ignore_eos=True)
    assert result[0].token_ids == wanted
    assert opened.session.capacity > 128
    assert opened.device.captured == 1 + 2  # a graph for each capacity
    assert decode.bound == 3 * tensors


def test_caches_are_one_buffer_with_the_plugin_and_two_without(bundles):
    for in_place, buffers in ((True, 1), (False, 2)):
        session = Opened(bundles["gqa"], in_place=in_place).session
        session.begin(2, 64)
        assert session.cache_bytes == buffers * 2 * 64 * bundles["gqa"].manifest.kv_bytes_per_token("chai")


def test_half_precision_logits_come_back_as_float32(tmp_path: Path):
    model = TinyModel(dtype="float16")
    opened = Opened(model.write(tmp_path / "half"))
    logits = opened.runner.logits(PROMPTS[1])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, model.reference(PROMPTS[1])[0], atol=5e-2)


def test_a_shape_outside_the_profile_says_what_to_build(bundles):
    session = Opened(bundles["mha"]).session
    session.begin(MAX_BATCH + 1, 64)
    rows = MAX_BATCH + 1
    with pytest.raises(ChaiError, match="build it with a higher --max-batch"):
        session.step(
            np.zeros((rows, 2), np.int64),
            np.full(rows, 2, np.int32),
            np.zeros(rows, np.int32),
            np.zeros((rows, 1), np.int64),
        )


def test_an_engine_of_another_model_is_refused(bundles, tmp_path: Path):
    engine = FakeEngine(bundles["mha"], MAX_BATCH, MAX_SEQ)
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
                in_place=True,
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
