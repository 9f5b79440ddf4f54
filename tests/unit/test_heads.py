import pytest

from chai_export.kernels.spec import Spec
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.op.heads import DecoderHeads, HeadCounts
from tests.helpers.tiny_graph import TinyModel


def test_a_token_takes_kept_keys_and_all_values():
    heads = HeadCounts(8, 4, 16, 24)
    assert heads.group == 2
    assert heads.cache_elements(3) == 3 * 16 + 4 * 24


def test_a_cache_that_layers_share_counts_once():
    alone = DecoderHeads(8, 4, 16, 16, num_layers=4)
    shared = DecoderHeads(8, 4, 16, 16, num_layers=4, kv_source_layers=(0, 0, 2, 2))
    assert shared.cache_layers == [0, 2]
    for kept in ([4, 4, 4, 4], [1, 1, 3, 3]):
        assert 2 * shared.kv_elements_per_token(kept) == alone.kv_elements_per_token(kept)
        assert shared.kv_bytes_saved(kept) == alone.kv_bytes_saved(kept)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_are_those_of_the_dtype(dtype, size):
    heads = DecoderHeads(4, 4, 8, 4, num_layers=2)
    storage = CacheStorage.exact(heads, Dtype(dtype))
    assert storage.token_bytes([2, 3]).total == size * (5 * 8 + 2 * 4 * 4)
    assert heads.kv_bytes_saved([2, 3]) == 3 * 8 / (2 * 4 * 12)


def test_query_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_query_heads 6 is no multiple of num_kv_heads 4"):
        HeadCounts(6, 4, 16, 16)


def test_every_holder_of_head_counts_agrees():
    model = TinyModel(heads=8, kv_heads=4, kept=(2, 4))
    manifest = model.manifest()
    spec = Spec(8, 4, model.head_dim, model.value_dim, "float32")
    assert spec.group == manifest.head_counts.group == 2
    assert manifest.kv_bytes_per_token("all") == 2 * spec.item_bytes * spec.cache_elements(4)
