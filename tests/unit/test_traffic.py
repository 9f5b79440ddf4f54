"""The bytes model of the kernels against bytes that are counted here."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from chai_export.kernels.blocks import choose
from chai_export.kernels.launches import build_program
from chai_export.kernels.spec import Shape, Spec
from chai_export.kernels.traffic import append_bytes, cache_bytes, decode_bytes, prefill_bytes
from chai_export.op.attributes import Attributes
from chai_export.op.cases import Case


@pytest.mark.parametrize(("key_bits", "value_bits"), [(0, 0), (16, 8), (8, 4), (4, 4)])
def test_cache_bytes_are_those_of_the_tensors(key_bits, value_bits):
    """A pool that one row fills has as many bytes as the model says, part by part."""
    attributes = Attributes(key_bits=key_bits, value_bits=value_bits, group=8)
    case = Case("bytes", 4, 4, 2, ((23, 1),), page=8, capacity=24, attributes=attributes)
    inputs = case.inputs("float32")
    of_pages = 24 / (len(inputs["key_cache"]) * 8)
    spec = Spec(4, 4, 16, 16, "float32", key_bits=key_bits, value_bits=value_bits, group_size=8)
    counted = cache_bytes(spec, Shape(1, 1, 2, 24, len(inputs["key_cache"]), 8), 24)
    assert counted.keys == inputs["key_cache"].nbytes * of_pages
    assert counted.values == inputs["value_cache"].nbytes * of_pages
    scales = [inputs[name].nbytes for name in ("key_scales", "value_scales") if name in inputs]
    assert counted.scales == sum(scales) * of_pages
    assert counted.page_table == inputs["page_table"].nbytes
    assert counted.together == counted.keys + counted.values + counted.scales + counted.page_table


def test_decode_moves_the_caches_once_and_little_else():
    spec = Spec(32, 32, 128, 128, "float16", key_bits=8, value_bits=4)
    shape = Shape(1, 1, 8, 16384, 200, 128)
    program = build_program(spec, choose(spec, 90))
    moved = decode_bytes(program, shape, 16383)
    stored = cache_bytes(spec, shape, 16384)
    assert 1.0 < sum(moved.values()) / stored.together < 1.1
    exact = Spec(32, 32, 128, 128, "float16")
    assert stored.together < 0.45 * cache_bytes(exact, shape, 16384).together


def test_a_window_bounds_what_decode_reads():
    spec = Spec(8, 8, 64, 64, "float16", key_bits=8, value_bits=8)
    program = build_program(spec, choose(spec, 90))
    shape = Shape(1, 1, 8, 4096, 40, 128)
    near, far = (decode_bytes(program, shape, past, window=256) for past in (300, 4000))
    assert near == far
    assert sum(far.values()) < 0.2 * sum(decode_bytes(program, shape, 4000).values())


def test_appending_and_prefill_count_rows_in_both_forms():
    spec = Spec(4, 4, 16, 16, "float32", key_bits=8, value_bits=4, group_size=8)
    shape = Shape(1, 5, 2, 24, 3, 8)
    key_row, value_row = 16 + 2 * 2, 8 + 2 * 4
    assert append_bytes(spec, shape, 5) == 5 * (2 * (64 + key_row) + 4 * (64 + value_row))
    queries_and_output = 4 * 5 * (2 * 16 + 4 * 16)
    assert prefill_bytes(spec, shape, 7, 5, 2) == queries_and_output + 12 * (
        2 * key_row + 4 * value_row
    ) + 4 * int(np.ceil(12 / 8))
