"""The runner's pages: the same texts whatever their length, the company and the room there is."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.errors import ChaiError, UsageError
from chai_export.runtime import cache, onnxruntime_session, scheduler
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, SWITCH, find_library
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.pages import PAGE_LENGTH
from chai_export.runtime.runner import Runner
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

GROUPED: dict[str, Any] = {"heads": 6, "kv_heads": 3, "kept": (1, 2), "head_dim": 4, "value_dim": 8}
SHARED: dict[str, Any] = {"heads": 6, "kv_heads": 3, "kept": (2, 1, 2), "sources": (0, 1, 0)}
EXACT = {"mha": {}, "gqa": GROUPED, "shared": SHARED, "switch": {"switch": 20}}
WINDOWED: dict[str, dict[str, Any]] = {
    "window": {"windows": (0, 9)},
    "windows": {"windows": (6, 17), "kept": (2, 2), "bits": ((8, 4), (0, 8))},
    "window alone": {"windows": (7, 7), "switch": 20},
    "window shared": {**SHARED, "windows": (11, 0, 11)},
}
STORED: dict[str, dict[str, Any]] = {
    "8/4": {"bits": (8, 4)},
    "mixed": {"bits": ((4, 16), (0, 8))},
    "shared 4/8": {**SHARED, "bits": ((4, 8), (8, 4), (0, 0))},
}
MODELS = {
    name: TinyModel(positions=400, **options) for name, options in {**EXACT, **STORED, **WINDOWED}.items()
}
TOLERANCE = 1e-4
SHORT, MIDDLE, LONG = [5, 9], [7, 8, 20, 21, 6, 30], list(range(4, 33))
PROMPTS = [SHORT, LONG, [11], MIDDLE, LONG[:7]]


@pytest.fixture
def library() -> None:
    if find_library(ONNXRUNTIME_LIBRARY) is None:
        pytest.skip("libchai_onnxruntime.so was not built")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    tokenizer = letters_tokenizer()
    return {
        name: model.write(root / str(index), tokenizer=tokenizer).path
        for index, (name, model) in enumerate(MODELS.items())
    }


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new pools with NaN, or with 0x7F where codes cannot be NaN."""
    real = onnxruntime_session.KvCache

    def poisoned_cache(*arguments: Any) -> Any:
        cache = real(*arguments)
        for array in cache.arrays.values():
            array[...] = np.nan if array.dtype.kind == "f" else 0x7F
        return cache

    monkeypatch.setattr(onnxruntime_session, "KvCache", poisoned_cache)


def opened(path: Path, heads: str = "chai", max_batch: int | None = None, **options: Any) -> Runner:
    """A runner whose session has options that `load` does not offer."""
    bundle = Bundle.load(path)
    session = OnnxRuntimeSession(bundle, heads, threads=1, **options)
    return Runner(bundle, session, Backend.ONNXRUNTIME, Heads(heads), max_batch)


def session_of(runner: Runner) -> OnnxRuntimeSession:
    assert isinstance(runner.session, OnnxRuntimeSession)
    return runner.session


def computed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens per row of every call of the graph from now on, padding included."""
    session = session_of(runner)
    real, shapes = session._call, []

    def call(fed: dict[str, Any], *arguments: Any) -> Any:
        shapes.append(fed["input_ids"].shape)
        return real(fed, *arguments)

    monkeypatch.setattr(session, "_call", call)
    return shapes


# One text


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 4, 6, 29])
def test_logits_and_head_maps_are_those_of_the_reference(implementation, bundles, name, heads, length):
    runner = opened(bundles[name], heads, page_length=8)
    logits, maps = MODELS[name].reference(LONG[:length], heads)
    np.testing.assert_allclose(runner.logits(LONG[:length]), logits, atol=TOLERANCE)
    assert np.array_equal(runner.head_maps, maps)


def test_float16_is_close(implementation, tmp_path):
    model = TinyModel(dtype="float16", bits=((8, 0), (0, 4)))
    runner = ce.load(model.write(tmp_path / "half").path)
    expected, _ = model.reference(LONG)
    np.testing.assert_allclose(runner.logits(LONG), expected, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["mha", "8/4", "switch"])
@pytest.mark.parametrize("chunks", [[5, 24], [20, 9], [5] + [1] * 24, [28, 1]])
@pytest.mark.parametrize("page_length", [1, 5, PAGE_LENGTH])
def test_chunks_and_pages_make_no_difference(implementation, bundles, name, chunks, page_length):
    runner = opened(bundles[name], page_length=page_length)
    logits, maps = MODELS[name].reference(LONG)
    np.testing.assert_allclose(runner.logits(LONG, chunks=chunks), logits, atol=TOLERANCE)
    assert np.array_equal(runner.head_maps, maps)


# Many texts


@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_do_not_depend_on_company(implementation, bundles, monkeypatch, name, heads, temperature):
    """Prompts below the probe, of several chunks, and such that cross a switch length alone or in company."""
    monkeypatch.setattr(scheduler, "LONGEST_CHUNK", 11)
    settings = {"max_new_tokens": 19, "temperature": temperature, "seed": 4}
    alone = opened(bundles[name], heads, 1)
    expected = alone.generate(PROMPTS, **settings)
    if not temperature:
        for prompt, generation in zip(PROMPTS, expected, strict=True):
            assert generation.token_ids == MODELS[name].greedy(prompt, 19, heads)
    for max_batch in (3, 8):
        runner = opened(bundles[name], heads, max_batch, page_length=4)
        assert runner.generate(PROMPTS, **settings) == expected
        assert np.array_equal(runner.head_maps, alone.head_maps)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_quantised_texts_in_company_are_those_of_the_reference(implementation, bundles, name, max_batch):
    runner = opened(bundles[name], max_batch=max_batch, page_length=4)
    for prompt, result in zip(PROMPTS, runner.generate(PROMPTS, max_new_tokens=12), strict=True):
        assert result.token_ids == MODELS[name].greedy(prompt, 12)


def test_a_text_that_fails_in_the_middle_leaves_the_runner_usable(implementation, bundles):
    runner = ce.load(bundles["mha"])

    def fail(index: int, text: str) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        runner.generate(["hello", "good day"], on_text=fail)
    (result,) = runner.generate([MIDDLE], max_new_tokens=5)
    assert result.token_ids == MODELS["mha"].greedy(MIDDLE, 5)


# What a call computes


def test_decoders_are_not_padded_while_another_row_is_prefilled(implementation, bundles, monkeypatch):
    """Seven rows decode when an eighth is admitted with a prompt of several chunks."""
    prompts = [[4 + row, 9, 17, 21, 6] for row in range(7)]
    runner = ce.load(bundles["mha"], max_batch=8)
    monkeypatch.setattr(scheduler, "LONGEST_CHUNK", 60)
    shapes = computed(runner, monkeypatch)
    results = runner.generate([*prompts, LONG * 4], max_new_tokens=6)
    assert shapes[:4] == [(7, 5), (1, 60), (7, 1), (1, 56)]
    fed = sum(len(result.token_ids) - 1 + result.prompt_tokens for result in results)
    assert sum(rows * tokens for rows, tokens in shapes) == fed


def test_rows_whose_text_has_ended_are_in_no_call(implementation, bundles, monkeypatch):
    prompts = [LONG[: 6 + row] for row in range(8)]
    runner = ce.load(bundles["mha"])
    shapes = computed(runner, monkeypatch)
    results = runner.generate(prompts, max_new_tokens=10, max_seq=15)
    made = [len(result.token_ids) for result in results]
    assert made == [10, 9, 8, 7, 6, 5, 4, 3]
    assert [rows for rows, tokens in shapes if tokens == 1] == [8, 8, 7, 6, 5, 4, 3, 2, 1]


def test_a_line_of_a_step_without_tokens_is_not_computed(implementation, bundles, monkeypatch):
    runner = ce.load(bundles["mha"])
    session = session_of(runner)
    session.begin(3, 16)
    shapes = computed(runner, monkeypatch)
    ids = np.array([LONG[:8], LONG[8:16], LONG[16:24]])
    last = np.array([[7], [0], [3]])
    step = session.step(ids, np.array([8, 0, 4], np.int32), np.zeros(3, np.int32), last)
    assert shapes == [(2, 8)]
    for row, tokens in ((0, LONG[:8]), (2, LONG[16:20])):
        np.testing.assert_allclose(step[row, 0], MODELS["mha"].reference(tokens)[0][-1], atol=TOLERANCE)
    assert not session.head_map[:, 1].any()
    none = session.step(ids, np.zeros(3, np.int32), np.array([8, 0, 4], np.int32), last)
    assert none.shape == step.shape
    assert len(shapes) == 1


# Memory


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["mha", "8/4"])
def test_a_row_grows_from_64_to_16384_tokens_without_a_copy_of_its_cache(tmp_path, monkeypatch, name):
    model = replace(MODELS[name], positions=16384)
    made: list[Any] = []
    real = onnxruntime_session.KvCache
    monkeypatch.setattr(onnxruntime_session, "KvCache", lambda *a: (made.append(real(*a)), made[-1])[1])
    session = OnnxRuntimeSession(model.write(tmp_path / "b"), threads=1)
    ids = np.random.default_rng(0).integers(4, 39, 16384)

    def feed(start: int, count: int) -> Any:
        return session.step(
            ids[None, start : start + count],
            np.array([count], np.int32),
            np.array([start], np.int32),
            np.array([[count - 1]]),
        )

    session.begin(1, 16384)
    (cache,) = made
    addresses = {part: array.ctypes.data for part, array in cache.arrays.items()}
    feed(0, 64)
    first = {part: array[0, :, :64].copy() for part, array in cache.arrays.items()}
    assert session.held_tokens == {0: PAGE_LENGTH}
    tracemalloc.start()
    length = 64
    while length < 16384:  # one token, then 47, through every offset in a page
        count = min(1 if length % 48 == 16 else 47, 16384 - length)
        logits = feed(length, count)
        length += count
    _, most = tracemalloc.get_traced_memory()  # NumPy reports its arrays to it
    tracemalloc.stop()
    assert len(made) == 1
    assert {part: array.ctypes.data for part, array in session.caches[0].arrays.items()} == addresses
    assert session.held_tokens == {0: 16384}
    assert session.cache_bytes == cache.nbytes
    assert most < cache.nbytes / 8
    for part, array in cache.arrays.items():
        assert np.array_equal(array[0, :, :64], first[part]), part
    whole = opened(tmp_path / "b").logits(ids.tolist())
    np.testing.assert_allclose(logits[0, 0], whole[-1], atol=TOLERANCE)


@pytest.mark.usefixtures("library")
def test_a_pool_takes_no_memory_before_it_is_written(bundles):
    if psutil.virtual_memory().available < 3 << 30:
        pytest.skip("needs 3 GiB of free memory")
    session = OnnxRuntimeSession(Bundle.load(bundles["mha"]), threads=1)
    resident = psutil.Process().memory_info().rss
    session.begin(1, (1 << 30) // session.page_bytes * session.page_length)
    session.step(np.array([LONG]), np.array([29], np.int32), np.zeros(1, np.int32), np.array([[28]]))
    assert session.caches[0].nbytes > 0.9 * 2**30
    assert session.cache_bytes == session.page_bytes
    assert psutil.Process().memory_info().rss - resident < 1 << 28


def test_the_library_appends_in_place_and_the_function_body_does_not(implementation, bundles):
    session = OnnxRuntimeSession(Bundle.load(bundles["mha"]))
    session.begin(1, 32)
    assert len(session.caches) == (1 if implementation == "library" else 2)


def test_the_function_body_has_buffers_for_the_pages_that_were_touched(bundles, monkeypatch):
    """Each call writes all of them, so what a text may need some day is not there yet."""
    monkeypatch.setenv(SWITCH, "0")
    runner = opened(bundles["8/4"], page_length=4)
    (result,) = runner.generate([SHORT], max_new_tokens=150)
    session = session_of(runner)
    assert (session.pool.pages, session.pool.touched) == (38, 38)
    (few,) = runner.generate([SHORT], max_new_tokens=20)
    assert few.token_ids == result.token_ids[:20]
    grown = [{0: 1}]
    real = session._grow
    monkeypatch.setattr(session, "_grow", lambda pages: (grown.append(pages), real(pages)))
    assert runner.generate([SHORT], max_new_tokens=150) == [result]
    assert grown == [{0: pages} for pages in (1, 2, 4, 8, 16, 32, 38)]
    assert result.token_ids == MODELS["8/4"].greedy(SHORT, 150)


def test_pools_are_as_large_as_the_longest_texts_that_run_together_need(implementation, bundles):
    runner = opened(bundles["mha"], max_batch=2, page_length=4)
    runner.generate([SHORT, LONG, MIDDLE], max_new_tokens=7, max_seq=32)
    needed = {32 // 4, (len(MIDDLE) + 6) // 4}
    assert session_of(runner).pool.pages == sum(needed)


@pytest.mark.parametrize("pages", [11, 12, 19, 40])
def test_rows_wait_for_pages_and_give_the_same_texts(implementation, bundles, monkeypatch, pages):
    """The longest text needs 11 pages of 4 positions."""
    plenty = opened(bundles["mha"], page_length=4)
    expected = plenty.generate(PROMPTS, max_new_tokens=14)
    memory = pages * session_of(plenty).page_bytes * len(_buffers(plenty))
    runner = opened(bundles["mha"], page_length=4, cache_memory=memory)
    shapes = computed(runner, monkeypatch)
    assert runner.generate(PROMPTS, max_new_tokens=14) == expected
    pool = session_of(runner).pool
    needed = [-(-(len(prompt) + 13) // 4) for prompt in PROMPTS]
    assert pool.pages == min(pages, sum(needed))
    assert (pool.held, pool.outstanding) == (0, 0)
    assert pool.peak <= pool.pages
    most_rows = max(rows for rows, _ in shapes)
    assert most_rows <= {11: 2, 12: 2, 19: 4, 40: 5}[pages]


def _buffers(runner: Runner) -> list[Any]:
    session_of(runner).begin(1, 1)
    return session_of(runner).caches


def test_a_text_that_fills_the_pool_ends_as_at_max_seq(implementation, bundles):
    plenty = opened(bundles["mha"], page_length=4)
    memory = 3 * session_of(plenty).page_bytes * len(_buffers(plenty)) + 1
    runner = opened(bundles["mha"], page_length=4, cache_memory=memory)
    results = runner.generate([MIDDLE, SHORT], max_new_tokens=100)
    assert [result.stop_reason for result in results] == ["capacity"] * 2
    assert [len(result.token_ids) for result in results] == [12 - 6 + 1, 12 - 2 + 1]
    assert results == plenty.generate([MIDDLE, SHORT], max_new_tokens=100, max_seq=12)


def test_a_prompt_that_the_pool_cannot_hold_names_the_flag(implementation, bundles):
    plenty = ce.load(bundles["mha"])
    memory = session_of(plenty).page_bytes * len(_buffers(plenty))
    runner = ce.load(bundles["mha"], cache_memory=memory)
    for call in (runner.logits, lambda ids: runner.generate([SHORT, ids])):
        with pytest.raises(ChaiError, match=r"has 129 tokens and 128 fit; .*raise --cache-memory \(\d"):
            call([4] * (PAGE_LENGTH + 1))
    with pytest.raises(ChaiError, match=r"has 6 tokens and 5 fit; .*--max-seq"):
        runner.generate([MIDDLE], max_seq=5)
    tiny = ce.load(bundles["mha"], cache_memory=1)
    with pytest.raises(ChaiError, match=r"has 2 tokens and 0 fit; .*raise --cache-memory \(1 B\)"):
        tiny.generate([SHORT])
    assert len(runner.logits([4] * PAGE_LENGTH)) == PAGE_LENGTH


def test_memory_that_is_not_there_is_one_line(implementation, bundles, monkeypatch):
    runner = ce.load(bundles["mha"])
    monkeypatch.setattr(cache, "available_memory", lambda: 1000)
    with pytest.raises(ChaiError, match=r"has 2 tokens and 0 fit; .* free memory \(1000 B are free\)"):
        runner.generate([SHORT])
    with pytest.raises(ChaiError, match=r"KV cache for 3 rows of 70 tokens takes .* --max-seq.* free memory"):
        runner.session.begin(3, 70)


@pytest.mark.usefixtures("library")
def test_addresses_that_the_system_does_not_reserve_are_one_line(bundles):
    program = (
        "import resource, chai_export as ce\n"
        f"runner = ce.load({str(bundles['8/4'])!r}, threads=1)\n"
        "runner.logits([4, 5, 6])\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "try:\n"
        "    runner.session.begin(1, (256 << 20) // 108)\n"
        "except ce.ChaiError as error:\n"
        "    print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "does not reserve 256.0 MiB for KV caches; lower --cache-memory, --max-seq" in answer.stdout


@pytest.mark.usefixtures("library")
def test_memory_that_goes_while_rows_wait_is_one_line_and_rows_that_run_go_on(bundles, monkeypatch):
    """Free memory is looked at again before pages that were never touched are promised."""
    runner = opened(bundles["mha"], page_length=4)
    page = session_of(runner).page_bytes
    free = 14

    def available() -> int:
        return (free - session_of(runner).pool.touched) * page

    monkeypatch.setattr(onnxruntime_session, "available_memory", available)
    expected = [MODELS["mha"].greedy(prompt, 10) for prompt in PROMPTS]
    shapes = computed(runner, monkeypatch)
    assert [r.token_ids for r in runner.generate(PROMPTS, max_new_tokens=10)] == expected
    assert max(rows for rows, _ in shapes) < len(PROMPTS)
    assert session_of(runner).pool.touched <= free < session_of(runner).pool.pages
    free = 2
    with pytest.raises(ChaiError, match=r"row of 11 tokens has no memory left.*--max-seq"):
        runner.generate([SHORT], max_new_tokens=10)


@pytest.mark.parametrize("heads", ["chai", "all"])
@pytest.mark.parametrize("name", ["mha", "mixed", "shared 4/8"])
def test_cache_bytes_are_those_of_the_pages_that_rows_held(implementation, bundles, name, heads):
    runner = opened(bundles[name], heads, page_length=4)
    runner.generate([MIDDLE, SHORT], max_new_tokens=4)
    pages = 3 + 2  # 9 and 5 positions; the last token of a text is not fed
    cache = session_of(runner).caches[0]
    per_page = sum(array[:1].nbytes for array in cache.arrays.values())
    assert runner.kv_cache_bytes == pages * per_page
    everything = opened(bundles[name], "all", page_length=4)
    everything.generate([MIDDLE, SHORT], max_new_tokens=4)
    assert runner.kv_cache_bytes_all_heads == everything.kv_cache_bytes
    assert (runner.kv_cache_bytes < everything.kv_cache_bytes) == (heads == "chai")
    runner.logits(LONG)
    assert runner.kv_cache_bytes == 8 * per_page


# What is refused


def test_a_size_of_nothing_is_refused(bundles):
    with pytest.raises(UsageError, match="--cache-memory is 0; give 1 or more"):
        ce.load(bundles["mha"], cache_memory=0)
