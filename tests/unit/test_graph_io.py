"""One definition of what a bundle's graph takes and gives; every writer and reader of graphs uses it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from chai_export.bundle.graph_io import (
    BATCH,
    OUTPUTS,
    PAGE_LENGTH,
    PAGES,
    ROW_PAGES,
    TOKENS,
    kept_sizes,
)
from chai_export.engines.tensorrt_profiles import profiles
from chai_export.op.dtypes import ELEMENT_TYPES
from tests.helpers.tiny_graph import TinyModel

SHARED = TinyModel(kept=(2, 2, 3), sources=(0, 0, 2))
MODELS = (
    TinyModel(),
    SHARED,
    TinyModel(kv_heads=2, kept=(1, 2), dtype="float16"),
    TinyModel(bits=(8, 4)),
    replace(SHARED, bits=(4, 16)),
)


def test_inputs_and_outputs_of_a_graph():
    io = TinyModel(dtype="float16").manifest().io
    assert [(v.name, v.dtype, v.dims) for v in io.inputs] == [
        ("input_ids", "int64", ("batch", "tokens")),
        ("lengths", "int32", ("batch",)),
        ("past_lengths", "int32", ("batch",)),
        ("output_positions", "int64", ("batch", "outputs")),
        ("page_table", "int32", ("batch", "row_pages")),
        ("head_map", "int32", (2, "batch", 4)),
        ("past_key.0", "float16", ("pages", "kept_heads_0", "page_length", 8)),
        ("past_value.0", "float16", ("pages", 4, "page_length", 4)),
        ("past_key.1", "float16", ("pages", "kept_heads_1", "page_length", 8)),
        ("past_value.1", "float16", ("pages", 4, "page_length", 4)),
    ]
    assert [(v.name, v.dtypes, v.dims) for v in io.outputs] == [
        ("logits", ("float16", "float32"), ("batch", "outputs", 40)),
        ("present_head_map", ("int32",), (2, "batch", 4)),
        ("present_key.0", ("float16",), ("pages", "kept_heads_0", "page_length", 8)),
        ("present_value.0", ("float16",), ("pages", 4, "page_length", 4)),
        ("present_key.1", ("float16",), ("pages", "kept_heads_1", "page_length", 8)),
        ("present_value.1", ("float16",), ("pages", 4, "page_length", 4)),
    ]


def test_caches_have_their_storage_and_scales():
    io = TinyModel(bits=(8, 4), kept=(3,), dtype="float16").manifest().io
    sizes = "pages", 4, "page_length"
    assert [(c.past.name, c.present.name, c.past.dtype, c.past.dims) for c in io.caches] == [
        ("past_key.0", "present_key.0", "int8", ("pages", "kept_heads_0", "page_length", 8)),
        ("past_value.0", "present_value.0", "uint8", (*sizes, 2)),
        ("past_key_scales.0", "present_key_scales.0", "float16", ("pages", "kept_heads_0", "page_length", 2)),
        ("past_value_scales.0", "present_value_scales.0", "float16", (*sizes, 2)),
    ]
    exact = TinyModel(bits=(0, 16), kept=(3,)).manifest().io
    assert [(c.past.name, c.past.dtype) for c in exact.caches] == [
        ("past_key.0", "float32"),
        ("past_value.0", "float16"),
    ]


def test_layers_that_read_another_cache_have_none():
    manifest = SHARED.manifest()
    names = [cache.past.name for cache in manifest.io.caches]
    assert names == ["past_key.0", "past_value.0", "past_key.2", "past_value.2"]
    for profile in profiles(manifest, 4, 64):
        assert [name for name in profile if name.startswith("past_") and "." in name] == names


@pytest.mark.parametrize("mode", ["chai", "all"])
def test_sizes_take_the_place_of_symbols(mode):
    manifest = SHARED.manifest()
    sizes = {
        BATCH: 2,
        TOKENS: 3,
        OUTPUTS: 1,
        ROW_PAGES: 4,
        PAGES: 5,
        PAGE_LENGTH: 7,
        **kept_sizes(manifest.heads(mode)),
    }
    shapes = {value.name: value.shape(sizes) for value in manifest.io.inputs}
    assert shapes["input_ids"] == (2, 3)
    assert shapes["output_positions"] == (2, 1)
    assert shapes["page_table"] == (2, 4)
    assert shapes["past_key.2"] == (5, 3 if mode == "chai" else 4, 7, 8)
    assert shapes["past_value.2"] == (5, 4, 7, 4)


def described(model: TinyModel) -> dict[str, tuple[str, list[int | None]]]:
    names = {element.onnx: element.name for element in ELEMENT_TYPES.values()}
    graph = model.graph().graph
    return {
        value.name: (
            names[value.type.tensor_type.elem_type],
            [dim.dim_value or None for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_graph_made_from_it_does_not_differ(model):
    assert model.manifest().io.difference(described(model)) is None
    onnx.checker.check_model(model.graph())


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (TinyModel(head_dim=16), "past_key.0 is float32 [None, None, None, 8] and should be float32 ["),
        (TinyModel(kept=(2, 3, 3)), "it lacks past_key.2, past_value.2, present_key.2"),
        (TinyModel(kept=(2,)), "it has past_key.1, past_value.1, present_key.1"),
        (TinyModel(dtype="float16"), "past_key.0 is float32 "),
        (TinyModel(vocab=41), "logits is float32 [None, None, 40] and should be float32 ['?', '?', 41]"),
        (TinyModel(heads=8), "head_map is int32 [2, None, 4] and should be int32 [2, '?', 8]"),
    ],
)
def test_the_first_difference_is_named(other, difference):
    assert other.manifest().io.difference(described(TinyModel())).startswith(difference)


def test_logits_of_a_half_precision_graph_may_be_float32():
    model = TinyModel(dtype="float16")
    given = described(model)
    assert model.manifest().io.difference({**given, "logits": ("float32", [None, None, 40])}) is None
    assert "logits is int32" in model.manifest().io.difference({**given, "logits": ("int32", [None] * 3)})


@pytest.mark.parametrize("model", [model for model in MODELS if model.dtype == "float32"])
def test_a_graph_gives_what_the_reference_gives(model):
    manifest, ids = model.manifest(), list(range(3, 14))
    sizes = {BATCH: 1, TOKENS: 11, OUTPUTS: 11, PAGES: 6, ROW_PAGES: 4, PAGE_LENGTH: 3}
    shapes = {**sizes, **kept_sizes(manifest.heads("chai"))}
    feeds = {
        value.name: np.zeros(value.shape(shapes), ELEMENT_TYPES[value.dtype].numpy)
        for value in manifest.io.inputs
    }
    feeds["input_ids"][:], feeds["lengths"][:], feeds["output_positions"][:] = ids, 11, range(11)
    feeds["page_table"][:] = [5, 0, 3, 1]
    session = onnxruntime.InferenceSession(model.graph().SerializeToString())
    logits, maps = session.run(["logits", "present_head_map"], feeds)
    wanted, wanted_maps = model.reference(ids)
    np.testing.assert_array_equal(maps, wanted_maps)
    # Rows that lie between two codes may get the other one; exact caches give 0.05 other logits.
    np.testing.assert_allclose(logits[0], wanted, atol=1e-4 if model.bits == (0, 0) else 1e-3)
