"""Engines: the record of ONNX Runtime, its limits, and backends that do not exist."""

from __future__ import annotations

import pytest

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.errors import ChaiError, UsageError
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library
from chai_export.runtime.pages import PAGE_LENGTH
from tests.helpers.tiny_graph import TinyModel


@pytest.fixture
def path(tmp_path):
    return TinyModel().write(tmp_path / "bundle").path


def test_the_record_is_in_the_bundle_and_the_bundle_still_loads(path):
    record = ce.build(path, max_batch=2, max_seq=10)
    assert Bundle.load(path).manifest.engines == {"onnxruntime": record}
    assert (record.max_batch, record.max_seq, record.files) == (2, 10, {})


def test_the_limits_of_the_engine_hold(path):
    ce.build(path, max_batch=2, max_seq=10)
    runner = ce.load(path)
    assert runner.generate([[4] * 8])[0].stop_reason == "capacity"
    with pytest.raises(ChaiError, match=r"has 11 tokens and 10 fit; .*chai-export build .*--max-seq"):
        runner.generate([[4] * 11])
    with pytest.raises(ChaiError, match=r"built for 2; .*--max-batch 3"):
        ce.load(path, max_batch=3)


def test_the_default_length_is_that_of_the_model(path, tmp_path):
    assert ce.build(path).max_seq == 96
    longer = TinyModel().write(tmp_path / "b", max_positions=None, context_length=33)
    assert ce.build(longer).max_seq == 33


def test_a_length_beyond_learned_positions_is_refused(path):
    with pytest.raises(ChaiError, match="--max-seq is 97 and the model has learned 96 positions"):
        ce.build(path, max_seq=97)


def test_limits_beyond_memory_are_refused(tmp_path):
    bundle = TinyModel().write(tmp_path / "b", max_positions=None)
    with pytest.raises(ChaiError, match="lower --max-seq"):
        ce.build(bundle, max_batch=1 << 20, max_seq=1 << 24)


def test_the_memory_of_the_engine_bounds_runs_that_name_none(path):
    page = Bundle.load(path).manifest.kv_bytes_per_token() * PAGE_LENGTH
    buffers = 1 if find_library(ONNXRUNTIME_LIBRARY) else 2
    record = ce.build(path, max_batch=1 << 20, max_seq=90, cache_memory=buffers * page)
    assert Bundle.load(path).manifest.engines["onnxruntime"].cache_memory == record.cache_memory
    runner = ce.load(path, max_batch=3)
    prompts = [[4, 5], [6, 7, 8], [9]]
    assert [r.token_ids for r in runner.generate(prompts, 4)] == [TinyModel().greedy(p, 4) for p in prompts]
    assert runner.kv_cache_bytes == page
    more = ce.load(path, max_batch=3, cache_memory=3 * buffers * page)
    more.generate(prompts, 4)
    assert more.kv_cache_bytes == 3 * page


def test_a_memory_in_which_no_row_fits_is_refused(path):
    with pytest.raises(ChaiError, match=r"1 rows of 90 tokens.*raise --cache-memory"):
        ce.build(path, max_seq=90, cache_memory=100)
    with pytest.raises(UsageError, match="--cache-memory is 0"):
        ce.build(path, cache_memory=0)


@pytest.mark.parametrize("limits", [{"max_batch": 0}, {"max_seq": 0}])
def test_limits_below_one_are_wrong_usage(path, limits):
    with pytest.raises(UsageError, match="give 1 or more"):
        ce.build(path, **limits)


@pytest.mark.parametrize("call", [ce.build, ce.load])
def test_an_unknown_backend_names_those_there_are(path, call):
    with pytest.raises(UsageError, match=r"^backend is 'abacus'; give one of: onnxruntime, tensorrt$"):
        call(path, backend="abacus")


def test_bfloat16_on_onnxruntime_says_what_to_do(tmp_path):
    bundle = TinyModel().write(tmp_path / "b", dtype="bfloat16")
    with pytest.raises(ChaiError, match=r"is bfloat16.*--dtype float32"):
        ce.build(bundle)
