"""SharedClusteredHeadAttention: schema, reference and function body, on the cases of the first op."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from chai_export.op import pages
from chai_export.op.cases import CACHES
from chai_export.op.comparison import widen
from chai_export.op.model import node_model
from chai_export.op.schema import SHARED_OP_TYPE, signature
from chai_export.op.shared_cases import SHARED_CASES, SharedCase, check_shared
from chai_export.op.shared_reference import SharedAttentionResult
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, find_library

by_name = {case.name: case for case in SHARED_CASES}


def model_of(case: SharedCase, dtype: str, **options: Any) -> onnx.ModelProto:
    return node_model(case.producer.attributes, dtype, op_type=SHARED_OP_TYPE, **options)


def run_in_onnxruntime(
    model: onnx.ModelProto, inputs: dict[str, np.ndarray], library: Path | None = None
) -> SharedAttentionResult:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return SharedAttentionResult(*session.run(list(signature(SHARED_OP_TYPE).output_names), inputs))


@pytest.mark.parametrize("name", ["mixed_phases", "twins_exact_ties", "offline", "right_padding"])
def test_function_body_runs_beside_the_native_library(name):
    library = find_library(ONNXRUNTIME_LIBRARY)
    if library is None:
        pytest.skip("libchai_onnxruntime.so was not built")
    inputs = by_name[name].inputs()
    result = run_in_onnxruntime(model_of(by_name[name], "float32"), inputs, library)
    check_shared(by_name[name], inputs, result)


def test_reading_with_the_producers_queries_gives_the_producers_result():
    """With every choice equal, both ops compute the same."""
    for case in SHARED_CASES:
        before = case.producer.inputs()
        own = case.producer.reference(before)
        shared = case.reference(
            {
                **before,
                **{name: getattr(own, name) for name in CACHES if name in before},
                "kept_head_map": own.present_head_map,
            }
        )
        np.testing.assert_array_equal(shared.present_head_map, own.present_head_map)
        np.testing.assert_array_equal(shared.output, own.output)


@pytest.mark.parametrize("name", ["h4_g4_r4", "h8_g2_r2", "h6_g3_r3"])
def test_keeping_every_head_is_plain_attention_over_the_producers_cache(name):
    case = by_name[name]
    inputs = {key: value if key in CACHES else widen(value[:1]) for key, value in case.inputs().items()}
    result = case.reference(inputs)
    assert result.present_head_map[0].tolist() == list(range(case.producer.heads))
    group, new = case.producer.heads // case.producer.kv_heads, case.producer.rows[0][1]
    keys, values = (
        widen(pages.read(inputs[name], inputs["page_table"][0], 0, new)).repeat(group, axis=0)
        for name in ("key_cache", "value_cache")
    )
    scores = inputs["query"][0, :, :new] @ keys.transpose(0, 2, 1) / np.sqrt(keys.shape[2])
    weights = np.where(np.tri(new, dtype=bool), np.exp(scores), 0)
    attended = (weights / weights.sum(axis=2, keepdims=True)) @ values
    wanted = attended.transpose(1, 0, 2).reshape(new, -1)
    np.testing.assert_allclose(result.output[0, :new], wanted, atol=1e-12)


@pytest.mark.parametrize("name", ["long_prefill", "long_prefill_k8v4"])
def test_a_prefill_in_chunks_is_one_prefill(name):
    """Producer and consumer together: what the second call reads is what the first left."""
    case = by_name[name]
    whole_inputs, inputs = case.producer.inputs(), case.inputs()
    whole = case.reference(inputs, np.float32)
    tokens = case.producer.rows[0][1]
    past = {name: value if name in CACHES else value[:1] for name, value in whole_inputs.items()}
    own_map, outputs = inputs["past_head_map"][:1], []
    for start, end in ((0, 7), (7, 8), (8, 90), (90, tokens)):
        past |= {name: whole_inputs[name][:1, :, start:end] for name in ("query", "key", "value")}
        past |= {
            "past_lengths": np.array([start], np.int32),
            "lengths": np.array([end - start], np.int32),
        }
        made = case.producer.reference(past, np.float32)
        past |= {name: getattr(made, name) for name in CACHES if name in past}
        shared = case.reference(
            {
                **past,
                "query": inputs["query"][:1, :, start:end],
                "kept_head_map": made.present_head_map,
                "past_head_map": own_map,
            },
            np.float32,
        )
        past["past_head_map"], own_map = made.present_head_map, shared.present_head_map
        outputs.append(shared.output[0])
    np.testing.assert_array_equal(own_map[0], whole.present_head_map[0])
    np.testing.assert_allclose(np.concatenate(outputs), whole.output[0, :tokens], atol=2e-6)


def test_maps_name_kept_heads_only_and_differ_from_the_producers():
    different = 0
    for case in SHARED_CASES:
        inputs = case.inputs()
        maps = case.reference(inputs).present_head_map
        group = case.producer.heads // case.producer.kv_heads
        for b in range(len(case.producer.rows)):
            if case.producer.is_fresh(b):
                kept = set(inputs["kept_head_map"][b] // group)
                assert set(maps[b] // group) == kept
                different += not np.array_equal(maps[b], inputs["kept_head_map"][b])
    assert different >= 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [99, 1]}, "lengths is 99"),
        ({"past_lengths": [0, 22]}, "exceed the capacity"),
        ({"past_head_map": [[0] * 8, [0, 1, 2, 3, 4, 5, 6, 9]]}, "between 0 and 7"),
        (
            {"kept_head_map": [[0] * 8, [4] * 8], "past_head_map": [[0] * 8, [1] * 8]},
            r"KV head 0.*kept \[1\]",
        ),
        ({"kept_head_map": [[0] * 8, [0, 1, 2, 3, 4, 5, 6, 7]]}, "keeps 2 KV heads, the K cache has 1"),
    ],
)
def test_reference_refuses_rows_that_make_no_sense(change, message):
    inputs = by_name["h8_g2_r1"].inputs()
    inputs.update({name: np.array(value, dtype=np.int32) for name, value in change.items()})
    with pytest.raises(ValueError, match=message):
        by_name["h8_g2_r1"].reference(inputs)


def test_function_body_stays_in_bounds_with_a_map_of_heads_that_are_not_kept():
    case = by_name["h8_g2_r1"]
    inputs = case.inputs()
    for kept, own in ((0, 7), (7, 0)):
        inputs["kept_head_map"][1], inputs["past_head_map"][1] = kept, own
        result = run_in_onnxruntime(model_of(case, "float32"), inputs)
        wanted = case.reference({**inputs, "lengths": inputs["lengths"] * np.array([1, 0], np.int32)})
        np.testing.assert_allclose(result.output[0], wanted.output[0], atol=1e-5)


def test_check_notices_damage():
    case = by_name["right_padding"]
    inputs = case.inputs()
    good = case.reference(inputs, np.float32)
    for field, index in (("output", (0, 0, 0)), ("output", (0, 5, 0)), ("present_head_map", (0, 1))):
        damaged = {"output": good.output.copy(), "present_head_map": good.present_head_map.copy()}
        damaged[field][index] += 1
        with pytest.raises(AssertionError, match=case.name):
            check_shared(case, inputs, SharedAttentionResult(**damaged))
