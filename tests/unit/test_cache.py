"""Caches have the shapes of the kept heads, grow by doubling, and refuse what memory cannot hold."""

from __future__ import annotations

import numpy as np
import pytest

from chai_export.errors import ChaiError
from chai_export.runtime.cache import KvCache, grown_capacity
from tests.helpers.tiny_graph import TinyModel


def test_key_caches_are_compact_and_value_caches_full():
    model = TinyModel(kept=(2, 3), kv_heads=4, head_dim=8, value_dim=4)
    shapes = {n: a.shape for n, a in KvCache(model.manifest(), "chai", 5, 7).arrays.items()}
    assert shapes == {"past_key.0": (5, 2, 7, 8), "past_key.1": (5, 3, 7, 8)} | {
        f"past_value.{i}": (5, 4, 7, 4) for i in (0, 1)
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("heads", ["chai", "all"])
def test_bytes_agree_with_the_manifest(heads, dtype):
    manifest = TinyModel(dtype=dtype).manifest()
    cache = KvCache(manifest, heads, 3, 11)
    assert cache.nbytes == sum(a.nbytes for a in cache.arrays.values())
    assert cache.nbytes == 3 * 11 * manifest.kv_bytes_per_token(heads)


def test_a_larger_cache_takes_over_all_positions():
    manifest = TinyModel().manifest()
    small, large = KvCache(manifest, "chai", 2, 4), KvCache(manifest, "chai", 2, 8)
    for array in small.arrays.values():
        array[...] = np.random.default_rng(0).standard_normal(array.shape)
    large.copy_from(small)
    for name, array in small.arrays.items():
        assert np.array_equal(large.arrays[name][:, :, :4], array)


@pytest.mark.parametrize(
    ("capacity", "needed", "limit", "grown"), [(64, 65, 1000, 128), (64, 300, 1000, 512), (64, 65, 100, 100)]
)
def test_capacity_doubles_up_to_the_limit(capacity, needed, limit, grown):
    assert grown_capacity(capacity, needed, limit) == grown


def test_a_cache_beyond_memory_is_one_line_that_names_the_flag():
    with pytest.raises(ChaiError, match="GiB are free; lower --max-seq"):
        KvCache(TinyModel().manifest(), "chai", 1 << 20, 1 << 24)
