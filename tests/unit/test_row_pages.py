"""Pages of layers with a window: freed behind it, never sooner, and as few as the arithmetic says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.runtime import scheduler
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.row_pages import PoolBytes, RowPages
from chai_export.runtime.runner import Runner
from tests.helpers.tiny_graph import TinyModel

WINDOW, LENGTH = 9, 4
MODEL = TinyModel(positions=400, windows=(0, WINDOW), kept=(2, 2))
PROMPTS = [list(range(4, 4 + n)) for n in (WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return MODEL.write(tmp_path_factory.mktemp("windowed") / "bundle")


def opened(bundle: Bundle, **options: Any) -> Runner:
    session = OnnxRuntimeSession(bundle, "chai", threads=1, page_length=LENGTH, **options)
    return Runner(bundle, session, Backend.ONNXRUNTIME, Heads.CHAI, max_batch=3)


def poison_what_is_free(session: OnnxRuntimeSession) -> None:
    """Write NaN to every page that no row holds, before each call reads its own."""
    real = session._session.run_with_iobinding

    class Poisoning:
        def run_with_iobinding(self, binding: Any) -> None:
            for cache in session._io.caches:
                pool = session.pages.pools[cache.window]
                array = session.caches[0].arrays[cache.past.name]
                for page in range(len(array)):
                    if not pool.references(page):
                        array[page] = np.nan
            real(binding)

        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

    original = session._session
    session._session = Poisoning()


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_texts_are_those_of_the_reference_with_poison_behind_the_window(bundle, monkeypatch, chunk):
    monkeypatch.setattr(scheduler, "LONGEST_CHUNK", chunk)
    runner = opened(bundle)
    poison_what_is_free(runner.session)
    for prompt, made in zip(PROMPTS, runner.generate(PROMPTS, max_new_tokens=3 * WINDOW), strict=True):
        assert made.token_ids == MODEL.greedy(prompt, 3 * WINDOW)


def test_a_window_holds_itself_and_a_chunk_whatever_the_length(bundle, monkeypatch):
    monkeypatch.setattr(scheduler, "LONGEST_CHUNK", 5)
    runner = opened(bundle)
    held = []
    for tokens in (60, 120, 240):
        runner.generate([PROMPTS[0]], max_new_tokens=tokens, ignore_eos=True)
        session = runner.session
        held.append(session.pages.pools[WINDOW].touched)
        assert session.held_tokens[0] == -(-(len(PROMPTS[0]) + tokens - 1) // LENGTH) * LENGTH
        of_window = MODEL.manifest().kv_bytes_by_window("chai")[WINDOW]
        whole = MODEL.manifest().kv_bytes_by_window("chai")[0]
        windows = session.held_tokens[WINDOW]
        assert runner.kv_cache_bytes == session.held_tokens[0] * whole + windows * of_window
        assert windows <= (WINDOW - 1 + 5 - 1 + LENGTH - 1) // LENGTH * LENGTH + LENGTH
    assert len(set(held)) == 1


def test_rows_that_find_no_window_wait(bundle, monkeypatch):
    """Memory for two windows: three rows do not run at one time, and their texts are what they were."""
    monkeypatch.setattr(scheduler, "LONGEST_CHUNK", 5)
    needed = opened(bundle).session._sizes(5)
    pages = needed.sizes(100, 1)
    memory = 40 * needed.page[0] + 2 * pages[WINDOW] * needed.page[WINDOW]
    runner = opened(bundle, cache_memory=memory, native=True)
    if not runner.session.in_place:
        pytest.skip("libchai_onnxruntime.so was not built")
    prompts = [PROMPTS[3]] * 4
    texts = runner.generate(prompts, max_new_tokens=20)
    assert {tuple(text.token_ids) for text in texts} == {tuple(MODEL.greedy(PROMPTS[3], 20))}
    assert runner.session.pool_bytes <= memory


def test_rows_give_back_what_no_coming_token_sees():
    pages = RowPages({0: 20, 6: 20}, page_length=4, chunk=4)
    assert pages.promise(0, 40)
    pool = pages.pools[6]
    assert pool.outstanding == 3  # 5 positions before the call's and 4 of it touch 3 pages at most
    for past in range(0, 40, 2):
        pages.extend(0, past, past + 2)
        first = max(0, past - 5)
        found = pool.pages_of(0)
        for place, page in enumerate(found):
            assert (page < 0) == ((place + 1) * 4 <= first), (past, found)
        assert pool.held <= 3
    assert pool.touched <= 3
    pages.extend(0, 0, 5)  # computed anew
    assert pool.pages_of(0).count(-1) == 0
    pages.release(0)
    assert (pool.held, pool.outstanding, pages.whole.held) == (0, 0, 0)


def test_pools_take_what_fits():
    of = PoolBytes({0: 100, 8: 50}, page_length=4, chunk=5)
    assert of.sizes(1, 3) == {0: 1, 8: 1}
    assert of.sizes(100, 3) == {0: 100, 8: 12}  # 12 positions touch 4 pages
    assert of.of(of.sizes(100, 3)) == 10600
    assert of.most_pages(10600, 3) == 100
    assert of.most_pages(10599, 3) == 99
    assert of.sizes_within(10600, 100, 9) == of.sizes(100, 3)
    assert of.sizes_within(1, 100, 9) == of.sizes(100, 1)
    assert of.most_pages(149, 1) == 0
    assert PoolBytes({0: 100}, 4, 5).most_pages(1099, 7) == 10


def test_a_beginning_is_there_where_its_window_is():
    pages = RowPages({0: 20, 6: 20}, page_length=4, chunk=4)
    stacks = [(0, -1), (1, 3), (2, 4)]
    assert pages.holds_view(stacks, 12)  # position 12 sees 7 … 12
    assert pages.view(stacks, 12) == [(0, -1), (1, 3), (2, 4)]
    assert pages.view(stacks, 13) == [(0, -1), (1, -1), (2, 4)]  # position 13 sees 8 … 13
    assert pages.holds_view(stacks[:2], 8) is False  # position 8 sees 3
    assert pages.holds_view(stacks, 9)  # position 9 sees 4
