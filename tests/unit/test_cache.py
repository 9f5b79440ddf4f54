"""Caches have the shapes of the kept heads and of the bits, and the bytes that the manifest tells."""

from __future__ import annotations

import pytest

from chai_export.runtime.cache import KvCache
from tests.helpers.tiny_graph import TinyModel


def test_key_caches_are_compact_and_value_caches_full():
    model = TinyModel(kept=(2, 3), kv_heads=4, head_dim=8, value_dim=4)
    shapes = {n: a.shape for n, a in KvCache(model.manifest(), "chai", {0: 5}, 7).arrays.items()}
    assert shapes == {"past_key.0": (5, 2, 7, 8), "past_key.1": (5, 3, 7, 8)} | {
        f"past_value.{i}": (5, 4, 7, 4) for i in (0, 1)
    }


@pytest.mark.parametrize("bits", [(0, 0), (16, 16), (8, 4), ((4, 8), (0, 16))])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("heads", ["chai", "all"])
def test_bytes_agree_with_the_manifest(heads, dtype, bits):
    manifest = TinyModel(dtype=dtype, bits=bits).manifest()
    cache = KvCache(manifest, heads, {0: 3}, 11)
    assert cache.nbytes == sum(a.nbytes for a in cache.arrays.values())
    assert cache.nbytes == 3 * 11 * manifest.kv_bytes_per_token(heads)
