"""ONNX Runtime's GroupQueryAttention on caches in int8, 4 bits and float16: the fastest peers there are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import helper

from chai_export.bench.peers import Run, bound_node, group_query_inputs
from chai_export.bench.problem import Problem, Tensor

_LARGEST = {8: 127, 4: 7}


def quantised_group_query_attention(bits: int) -> Callable[[Problem, int], Run]:
    """GroupQueryAttention on caches of 8 or 4 bits, symmetric, one scale per channel."""

    def build(problem: Problem, threads: int) -> Run:
        case = problem.case
        inputs = group_query_inputs(problem)
        for name in ("key", "value"):
            cache = inputs[f"past_{name}"]
            scale = np.abs(cache).max(axis=(0, 2), keepdims=True)[0].astype(np.float32) / _LARGEST[bits]
            inputs[f"past_{name}"] = _quantised(cache, scale, bits)
            inputs[f"{name[0]}_scale"] = scale
        names = list(inputs)
        node = helper.make_node(
            "GroupQueryAttention",
            [*names[:7], "", "", "", "", "", *names[7:]],
            ["output", "present_key", "present_value"],
            domain="com.microsoft",
            num_heads=case.heads,
            kv_num_heads=case.kv_heads,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
            kv_cache_bit_width=bits,
        )
        output = np.empty_like(inputs["query"])
        outputs = {
            "output": output,
            "present_key": inputs["past_key"],
            "present_value": inputs["past_value"],
        }
        run = bound_node(node, inputs, outputs, threads, opset=18)
        return lambda: (run(), output)[1]

    return build


def _quantised(cache: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 [B, G, T, D], or uint8 [B, G, T, D/2] with the even channel in the low half, offset by 8."""
    batch, heads, length, width = cache.shape
    dtype = np.int8 if bits == 8 else np.uint8
    packed = np.empty((batch, heads, length, width * bits // 8), dtype)
    for row, head in np.ndindex(batch, heads):
        codes = np.clip(np.rint(cache[row, head] / scale[head]), -_LARGEST[bits], _LARGEST[bits])
        if bits == 4:
            shifted = (codes + 8).astype(np.uint8)
            packed[row, head] = shifted[:, 0::2] | shifted[:, 1::2] << 4
        else:
            packed[row, head] = codes
    return packed


def half_group_query_attention(problem: Problem, threads: int) -> Run:
    """GroupQueryAttention with everything in float16."""
    case = problem.case
    inputs = {
        name: array.astype(np.float16) if array.dtype == np.float32 else array
        for name, array in group_query_inputs(problem).items()
    }
    node = helper.make_node(
        "GroupQueryAttention",
        list(inputs),
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
    )
    output = np.empty_like(inputs["query"])
    outputs = {"output": output, "present_key": inputs["past_key"], "present_value": inputs["past_value"]}
    run = bound_node(node, inputs, outputs, threads, opset=18)
    return lambda: (run(), output)[1]
