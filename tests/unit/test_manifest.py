"""What a manifest refuses, and what it says then."""

from __future__ import annotations

import json

import pytest

from chai_export.bundle.manifest import Manifest, read_manifest, write_manifest
from chai_export.errors import ChaiError, UsageError
from tests.helpers.tiny_graph import TinyModel


@pytest.fixture
def manifest() -> Manifest:
    return TinyModel().manifest()


def test_manifest_survives_writing_and_reading(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "chai-bundle/2"}, "format 'chai-bundle/2' and this version of chai_export reads"),
        ({"dtype": "int4"}, "dtype: Input should be"),
        ({"kept_heads": [2]}, "kept_heads has 1 numbers for 2 layers"),
        ({"kept_heads": [2, 9]}, "kept_heads has 9, more than the 4 KV heads"),
        ({"kept_heads": [0, 1]}, r"kept_heads\.0: Input should be greater"),
        ({"num_query_heads": 6}, "num_query_heads 6 is no multiple"),
        ({"kv_source_layers": [0]}, "kv_source_layers has 1 numbers for 2 layers"),
        ({"kv_source_layers": [1, 1]}, "layer 0 reads the cache of layer 1, which has none before it"),
        ({"kv_source_layers": [0, 0]}, "layer 1 keeps 3 KV heads and reads the cache of layer 0"),
        ({"colour": "blue"}, "colour: Extra inputs"),
        ({"files": {"../passwd": {"sha256": "0" * 64, "size": 1}}}, "no path inside the bundle"),
        ({"opset": None}, "opset: Input should be a valid integer"),
    ],
)
def test_a_wrong_field_is_named_with_what_to_run_again(tmp_path, manifest, change, message):
    content = {**manifest.model_dump(mode="json"), **change}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ChaiError, match=message) as caught:
        read_manifest(tmp_path)
    assert "again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_bundle_is_said_to_be_none(tmp_path):
    with pytest.raises(ChaiError, match="is not a bundle"):
        read_manifest(tmp_path)
    with pytest.raises(ChaiError, match="is not a bundle"):
        read_manifest(tmp_path / "absent")


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_damaged_manifest_is_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ChaiError, match=r"manifest\.json") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_layers_that_read_one_cache_count_it_once(tmp_path, manifest):
    shared = manifest.model_copy(update={"kept_heads": [2, 2], "kv_source_layers": [0, 0]})
    for mode in ("chai", "all"):
        assert shared.kv_bytes_per_token(mode) * 2 == shared.model_copy(
            update={"kv_source_layers": None}
        ).kv_bytes_per_token(mode)
    assert (manifest.cache_layers, shared.cache_layers) == ([0, 1], [0])
    write_manifest(tmp_path, shared)
    assert read_manifest(tmp_path).kv_source_layers == [0, 0]
    write_manifest(tmp_path, manifest)
    assert "kv_source_layers" not in (tmp_path / "manifest.json").read_text()


def test_cache_bytes_count_kept_keys_and_all_values():
    manifest = TinyModel(kept=(2, 3), head_dim=8, value_dim=4, kv_heads=4).manifest()
    assert manifest.kv_bytes_per_token("chai") == 4 * ((2 + 3) * 8 + 2 * 4 * 4)
    assert manifest.kv_bytes_per_token("all") == 4 * ((4 + 4) * 8 + 2 * 4 * 4)
    assert TinyModel(dtype="float16").manifest().kv_bytes_per_token() == manifest.kv_bytes_per_token() // 2


def test_bytes_of_a_cache_are_those_of_its_parts():
    manifest = TinyModel(bits=(8, 4)).manifest()  # 2 and 3 of 4 heads; rows of 8 and 4, 4 to a scale
    found = manifest.kv_bytes_by_part("chai")
    assert (found.keys, found.values) == ((2 + 3) * 8, 2 * 4 * 2)
    assert found.scales == 2 * ((2 + 3) * 2 + 2 * 4 * 2)
    assert manifest.kv_bytes_per_token("chai") == found.total
    assert manifest.storage.layer_bytes(1, 3).keys == 3 * 8
    assert manifest.kv_bytes_per_token_float16 == 2 * 2 * 4 * (8 + 4)


@pytest.mark.parametrize("mode", ["anything", "", "CHAI", None, True])
def test_a_mode_that_there_is_not_is_refused_where_it_is_asked_for(mode):
    manifest = TinyModel().manifest()
    for ask in (manifest.heads, manifest.kv_bytes_per_token):
        with pytest.raises(UsageError, match=r"^heads is .*; give one of: chai, all$"):
            ask(mode)
