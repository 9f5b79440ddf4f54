"""One runner and several callers: a second call is refused, and the first one never notices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import chai_export as ce
from chai_export.errors import UsageError
from chai_export.runtime.runner import Generation, Runner
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

MODEL = TinyModel(positions=96)
PROMPTS = ["hello", "good day"]
REFUSED = "called while another call of the same Runner goes on"
SECONDS = 60
"""Longer than anything here takes; a deadlock fails instead of hanging."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("threads") / "b", tokenizer=letters_tokenizer()).path


@pytest.fixture
def runner(path: Path) -> Runner:
    return ce.load(path, threads=1)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Generation]:
    return ce.load(path, threads=1).generate(PROMPTS, max_new_tokens=12)


SECOND_CALLS: dict[str, Callable[[Runner], object]] = {
    "generate": lambda runner: runner.generate([[4, 5, 6]], max_new_tokens=3),
    "logits": lambda runner: runner.logits([4, 5, 6, 7]),
}


@pytest.mark.parametrize("call", SECOND_CALLS)
def test_a_second_call_from_another_thread_is_refused_and_disturbs_nothing(runner, expected, call):
    runner.logits([9, 8, 7])
    before = (runner.timings, runner.head_maps.copy(), runner.kv_cache_bytes)
    inside, go_on = threading.Event(), threading.Event()
    results: list[list[Generation]] = []

    def wait(index: int, text: str) -> None:
        inside.set()
        assert go_on.wait(SECONDS)

    first = threading.Thread(
        target=lambda: results.append(runner.generate(PROMPTS, max_new_tokens=12, on_text=wait))
    )
    first.start()
    try:
        assert inside.wait(SECONDS)
        for _ in range(3):
            with pytest.raises(UsageError, match=f"^{call} was {REFUSED}"):
                SECOND_CALLS[call](runner)
        # What is known is still about the call before: the one that runs is not finished.
        assert (runner.timings, runner.kv_cache_bytes) == (before[0], before[2])
        assert np.array_equal(runner.head_maps, before[1])
    finally:
        go_on.set()
        first.join(SECONDS)
    assert results == [expected]
    assert runner.timings.ttft_ms > 0
    assert runner.head_maps.shape == (2, len(PROMPTS), MODEL.heads)
    SECOND_CALLS[call](runner)


@pytest.mark.parametrize("call", SECOND_CALLS)
def test_a_call_from_inside_on_text_is_refused_and_the_text_goes_on(runner, expected, call):
    refused = []

    def nested(index: int, text: str) -> None:
        with pytest.raises(UsageError, match=REFUSED):
            SECOND_CALLS[call](runner)
        refused.append(text)

    assert runner.generate(PROMPTS, max_new_tokens=12, on_text=nested) == expected
    assert refused


@pytest.mark.parametrize(
    "error", [ValueError("mine"), UsageError("mine"), KeyboardInterrupt("mine")], ids=repr
)
def test_what_on_text_raises_comes_out_and_leaves_the_runner_usable(runner, expected, error):
    runner.generate([[5, 6]], max_new_tokens=2)
    maps = runner.head_maps.copy()
    pieces = []

    def fail(index: int, text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise error

    with pytest.raises(type(error), match="mine") as caught:
        runner.generate(PROMPTS, max_new_tokens=12, on_text=fail)
    assert caught.value is error
    assert np.array_equal(runner.head_maps, maps)
    assert runner.generate(PROMPTS, max_new_tokens=12) == expected


def test_a_refused_argument_leaves_the_runner_usable(runner, expected):
    for _ in range(2):
        with pytest.raises(UsageError, match="--temperature"):
            runner.generate(PROMPTS, temperature=float("nan"))
    assert runner.generate(PROMPTS, max_new_tokens=12) == expected


def test_six_threads_get_right_texts_or_refusals(runner, expected):
    start = threading.Barrier(6)
    right, refused, wrong = [], [], []

    def work() -> None:
        start.wait(SECONDS)
        for _ in range(20):
            try:
                result = runner.generate(PROMPTS, max_new_tokens=12)
            except UsageError as error:
                (refused if REFUSED in str(error) else wrong).append(error)
            else:
                (right if result == expected else wrong).append(result)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert not wrong
    assert len(right) + len(refused) == 120
    assert right


def test_threads_with_a_runner_each_do_not_wait_for_each_other(path, expected):
    both_inside = threading.Barrier(2)
    results = []

    def work() -> None:
        waited = []

        def meet(index: int, text: str) -> None:
            if not waited:
                waited.append(both_inside.wait(SECONDS))

        results.append(ce.load(path, threads=1).generate(PROMPTS, max_new_tokens=12, on_text=meet))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert results == [expected, expected]
