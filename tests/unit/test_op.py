"""The op in NumPy: its table of cases, and what follows from the specification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chai_export.op import pages
from chai_export.op.attend import HeadTerms, probe_probabilities
from chai_export.op.attributes import Attributes
from chai_export.op.cases import CACHES, CASES, TERM_CASES, Case, check
from chai_export.op.comparison import check_output
from chai_export.op.head_map import choose_kv_heads, distances, greedy_order, quantise, squared_distances
from chai_export.op.storage import Storage

EVERY = (*CASES, *TERM_CASES)
by_name = {case.name: case for case in EVERY}
QUANTISED = [case for case in CASES if case.attributes.key_bits or case.attributes.value_bits]
every_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
UNQUANTISED = Attributes()


def assert_same(actual, expected, atol=0.0):
    np.testing.assert_allclose(actual.output, expected.output, rtol=0, atol=atol)
    np.testing.assert_array_equal(actual.present_head_map, expected.present_head_map)


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reference_in_float32_agrees_with_float64(case, dtype):
    inputs = case.inputs(dtype)
    check(case, inputs, case.reference(inputs, np.float32), dtype)


def test_check_allows_rounding_where_values_cancel_out_and_no_more():
    exact = np.full((1, 1, 1), -1.19e-4)
    lengths = np.ones(1, np.int32)
    check_output("cancelled", exact + 2.8e-8, exact, lengths, "float32")
    with pytest.raises(AssertionError, match="differs by 1e-06"):
        check_output("wrong", exact + 1e-6, exact, lengths, "float32")


@every_case
def test_any_permutation_of_pages_gives_the_same_bytes(case):
    inputs = case.inputs()
    expected = case.reference(inputs, np.float32)
    order = np.random.default_rng(5).permutation(len(inputs["key_cache"]))
    place = np.argsort(order)
    table = inputs["page_table"]
    moved = {**inputs, **{name: inputs[name][order] for name in CACHES if name in inputs}}
    known = (table >= 0) & (table < len(order))
    moved["page_table"] = np.where(known, place[np.where(known, table, 0)], table).astype(np.int32)
    actual = case.reference(moved, np.float32)
    assert_same(actual, expected)
    for name in CACHES:
        if name in inputs:
            np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name)[order])


@pytest.mark.parametrize("bits", [(0, 0), (8, 4)])
def test_a_page_of_two_rows_gives_what_two_copies_give(bits):
    shared = by_name["shared_prefix"]
    shared = replace(shared, attributes=replace(UNQUANTISED, key_bits=bits[0], value_bits=bits[1], group=8))
    inputs = shared.inputs()
    table = inputs["page_table"].copy()
    spare = sorted(set(range(len(inputs["key_cache"]))) - set(table.ravel().tolist()))[:2]
    copied = {name: value.copy() for name, value in inputs.items()}
    for index, page in enumerate(spare):
        for name in CACHES:
            if name in copied:
                copied[name][page] = copied[name][table[1, index]]
        copied["page_table"][1, index] = page
    assert_same(shared.reference(copied), shared.reference(inputs))


def repaged(case: Case, inputs: dict[str, np.ndarray], page: int) -> dict[str, np.ndarray]:
    """The same rows in pages of another size."""
    rows, per_row = len(case.rows), -(-case.capacity // page)
    table = np.random.default_rng(3).permutation(rows * per_row).reshape(rows, per_row).astype(np.int32)
    result = {**inputs, "page_table": table}
    for name in CACHES:
        if name in inputs:
            _, heads, _, columns = inputs[name].shape
            result[name] = np.zeros((rows * per_row, heads, page, columns), inputs[name].dtype)
            for b, (past, new) in enumerate(case.rows):
                start = case.attributes.first_visible(past)
                if new and past > start:
                    content = pages.read(inputs[name], inputs["page_table"][b], start, past)
                    pages.write(result[name], table[b], start, content, slice(None))
    return result


@pytest.mark.parametrize("page", [1, 3, 24])
@pytest.mark.parametrize("name", ["mixed_phases", "mixed_phases_k8v4", "mixed_phases_everything_k8v4"])
def test_the_size_of_a_page_changes_nothing(name, page):
    case = by_name[name]
    inputs = case.inputs()
    assert_same(case.reference(repaged(case, inputs, page)), case.reference(inputs))


@pytest.mark.parametrize("case", QUANTISED, ids=lambda case: case.name)
def test_a_quantised_cache_equals_the_exact_op_on_dequantised_rows(case):
    inputs = case.inputs()
    inputs["lengths"] = np.minimum(inputs["lengths"], 1) * (
        inputs["past_lengths"] > 0
    )  # decode: no exact probe
    actual = case.reference(inputs)
    exact = {name: value for name, value in inputs.items() if not name.endswith("_scales")}
    exact["key_cache"] = case.storage_k.load(inputs["key_cache"], inputs.get("key_scales"), np.float32)
    exact["value_cache"] = case.storage_v.load(inputs["value_cache"], inputs.get("value_scales"), np.float32)
    for name, storage in (("key", case.storage_k), ("value", case.storage_v)):
        exact[name] = storage.load(*storage.store(np.nan_to_num(inputs[name])), np.float32)
    plain = replace(case, attributes=replace(case.attributes, key_bits=0, value_bits=0))
    assert_same(actual, plain.reference(exact), atol=1e-6)


@pytest.mark.parametrize("name", ["mixed_phases", "mixed_phases_k8v4", "long_prefill"])
def test_terms_that_say_nothing_change_nothing(name):
    case = by_name[name]
    inputs = case.inputs()
    expected = case.reference(inputs)
    heads = case.heads
    wide = replace(case, attributes=replace(case.attributes, window=1 << 20))
    assert_same(wide.reference(inputs), expected)
    assert_same(case.reference({**inputs, "sinks": np.full(heads, -np.inf, np.float32)}), expected)
    assert_same(case.reference({**inputs, "alibi_slopes": np.zeros(heads, np.float32)}), expected)


@pytest.mark.parametrize("bits", [(0, 0), (8, 8), (8, 4)])
def test_a_prompt_in_chunks_gives_what_it_gives_at_once(bits):
    """The exact probe ends with the first chunk, so that the first chunk is the probe."""
    attributes = Attributes(key_bits=bits[0], value_bits=bits[1], group=8, probe_tokens=5)
    case = Case("chunks", 8, 4, 2, ((0, 20),), attributes=attributes)
    inputs = case.inputs()
    whole = case.reference(inputs)
    state = {**inputs}
    pieces = []
    for start, stop in ((0, 5), (5, 6), (6, 20)):
        for name in ("query", "key", "value"):
            state[name] = inputs[name][:, :, start:stop]
        state["past_lengths"], state["lengths"] = (np.array([n], np.int32) for n in (start, stop - start))
        result = case.reference(state)
        pieces.append(result.output)
        state |= {name: getattr(result, name) for name in CACHES if name in state}
        state["past_head_map"] = result.present_head_map
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole.output, rtol=0, atol=1e-12)
    for name in CACHES:
        if name in inputs:
            np.testing.assert_array_equal(state[name], getattr(whole, name))


def refused(case: Case, inputs: dict[str, np.ndarray], message: str) -> None:
    before = {name: value.copy() for name, value in inputs.items()}
    with pytest.raises(ValueError, match=message):
        case.reference(inputs)
    for name, value in before.items():
        np.testing.assert_array_equal(inputs[name], value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, -1, 9], [4, 5, 6]], "row 0: page_table entry 1 is -1, the pool has 9 pages"),
        ([[0, 9, 9], [4, 5, 6]], "row 0: page_table entry 1 is 9"),
        ([[0, 1, -1], [4, 1, 6]], "row 0: page 1 is written to and stands in this call twice"),
        ([[1, 1, -1], [4, 5, 6]], "row 0: page 1 is written to and stands in this call twice"),
    ],
)
def test_bad_page_tables_are_refused(table, message):
    case = Case("bad_table", 4, 4, 2, ((9, 7), (9, 1)))
    inputs = case.inputs()
    inputs["page_table"] = np.array(table, np.int32)
    refused(case, inputs, message)


@pytest.mark.parametrize(
    ("bits", "width", "group", "message"),
    [
        (8, 20, 8, "group must divide the head dim 20, got 8"),
        (4, 9, 3, "4 bits need an even group, got 3"),
        (8, 16, 0, "group must divide"),
        (3, 16, 8, "bits must be one of 0, 16, 8, 4, got 3"),
    ],
)
def test_storage_that_does_not_fit_is_refused(bits, width, group, message):
    with pytest.raises(ValueError, match=message):
        Storage(bits, width, group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe_tokens": 0}, "probe_tokens"),
        ({"window": -1}, "window"),
        ({"softcap": float("nan")}, "softcap"),
    ],
)
def test_bad_attributes_are_refused(change, message):
    case = replace(by_name["mixed_phases"], attributes=replace(UNQUANTISED, **change))
    inputs = by_name["mixed_phases"].inputs()
    refused(case, inputs, message)


@pytest.mark.parametrize(("bits", "steps"), [(8, 254), (4, 15)])
def test_an_element_is_off_by_half_a_step_of_its_group_at_most(bits, steps):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, 64)).astype(np.float32) * np.exp(rng.uniform(-6, 6, (200, 1))).astype(
        np.float32
    )
    storage = Storage(bits, 64, 32)
    error = np.abs(storage.load(*storage.store(x), np.float32) - x).reshape(200, 2, 32)
    grouped = x.reshape(200, 2, 32)
    spread = 2 * np.abs(grouped).max(2) if bits == 8 else grouped.max(2) - grouped.min(2)
    # float16 scales and minima add a 2048th of themselves.
    assert (error.max(2) <= spread / steps / 2 + np.abs(grouped).max(2) * steps / 2**11 / 8).all()


def test_two_codes_of_4_bits_share_a_byte_the_even_one_low():
    storage = Storage(4, 4, 4)
    stored, scales = storage.store(np.array([[0.0, 15.0, 3.0, 7.0]], np.float32))
    assert stored.tolist() == [[0xF0, 0x73]]
    assert scales.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_elements_and_zeros_are_stored_exactly(bits):
    storage = Storage(bits, 8, 4)
    for value in (0.0, 0.5, -2.0):
        x = np.full((1, 8), value, np.float32)
        np.testing.assert_allclose(storage.load(*storage.store(x), np.float32), x, rtol=2**-11)


def test_bytes_of_a_row_count_codes_and_scales():
    assert [Storage(bits, 64, 32).row_bytes(4) for bits in (0, 16, 8, 4)] == [256, 128, 68, 40]


def test_keeping_every_head_gives_the_identity_map():
    for name in ("h4_g4_r4", "h8_g2_r2", "h6_g3_r3"):
        case = by_name[name]
        result = case.reference(case.inputs())
        assert result.present_head_map[0].tolist() == list(range(case.heads))


def line_distances(points: list[int]) -> np.ndarray:
    return np.abs(np.subtract.outer(points, points)).astype(np.int64)


def test_every_choice_is_made_once_more():
    distance = line_distances([0, 1, 2, 10, 11, 3])
    assert sorted(greedy_order(distance, 6, 2)[0]) == [2, 3]
    assert sorted(choose_kv_heads(distance, 6, 2)) == [1, 3]


def test_distances_are_absolute():
    quantised = np.array([[[0, 3]], [[1, 5]]], dtype=np.int32)
    assert distances(quantised).tolist() == [[0, 3], [3, 0]]
    assert squared_distances(quantised).tolist() == [[0, 5], [5, 0]]


def test_cases_tell_choosing_twice_from_choosing_once_and_absolute_from_squared():
    once = squared = 0
    for case in CASES:
        inputs = case.inputs()
        for b, (_, new) in enumerate(case.rows):
            if case.is_fresh(b):
                probe = slice(0, min(case.attributes.probe_tokens, new))
                query, key = inputs["query"][b, :, probe], inputs["key"][b, :, probe]
                u = quantise(probe_probabilities(query, key, case.attributes, HeadTerms(None, None)))
                chosen = set(choose_kv_heads(distances(u), case.kv_heads, case.kept))
                once += chosen != set(greedy_order(distances(u), case.kv_heads, case.kept)[0])
                squared += chosen != set(choose_kv_heads(squared_distances(u), case.kv_heads, case.kept))
    assert once >= 3
    assert squared >= 3


def test_twins_are_found_as_clusters():
    case = by_name["twins_exact_ties"]
    result = case.reference(case.inputs())
    assert result.present_head_map.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [99, 1]}, "lengths is 99"),
        ({"lengths": [-1, 1]}, "lengths is -1"),
        ({"past_lengths": [-2, 3]}, "must not be negative"),
        ({"past_lengths": [0, 22]}, "exceed the capacity"),
        ({"past_head_map": [[0] * 8, [0, 1, 2, 3, 4, 5, 6, 9]]}, "between 0 and 7"),
        ({"past_head_map": [[0] * 8, [0, 1, 2, 3, 4, 5, 6, 7]]}, "keeps 2 KV heads, the K cache has 1"),
    ],
)
def test_rows_that_make_no_sense_are_refused(change, message):
    case = by_name["h8_g2_r1"]
    inputs = case.inputs()
    inputs.update({name: np.array(value, dtype=np.int32) for name, value in change.items()})
    refused(case, inputs, message)


def test_check_notices_every_kind_of_damage():
    case = by_name["right_padding"]
    inputs = case.inputs()
    good = case.reference(inputs, np.float32)
    for field, index in (
        ("output", (0, 0, 0)),
        ("output", (0, 5, 0)),
        ("key_cache", (1, 0, 3, 3)),
        ("value_cache", (1, 0, 0, 3)),
        ("present_head_map", (0, 1)),
    ):
        damaged = getattr(good, field).copy()
        damaged[index] = 1
        if (damaged == getattr(good, field)).all():
            damaged[index] = 2
        with pytest.raises(AssertionError, match=case.name):
            check(case, inputs, replace(good, **{field: damaged}))
