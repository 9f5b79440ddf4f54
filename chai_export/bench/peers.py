"""Attention implementations to compare the op with, on the same problem and, where possible, the same memory.

Every builder returns a function that evaluates the problem once and returns its output as [B, S, H*D], so
that the outputs can be compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
from numpy.typing import NDArray
from onnx import helper

from chai_export.bench.problem import Problem
from chai_export.bench.tensors import ort_value
from chai_export.errors import reason
from chai_export.op.dtypes import ELEMENT_TYPES

Tensor = NDArray[Any]
Run = Callable[[], Tensor]


class SkippedError(Exception):
    """A peer that cannot run this problem, with the reason."""


def group_query_attention(problem: Problem, threads: int) -> Run:
    """ONNX Runtime's GroupQueryAttention; past and present share a buffer, as its users bind it."""
    case = problem.case
    inputs = group_query_inputs(problem)
    node = helper.make_node(
        "GroupQueryAttention",
        list(inputs),
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
    )
    output = np.empty_like(inputs["query"])
    outputs = {"output": output, "present_key": problem.key_cache, "present_value": problem.value_cache}
    run = bound_node(node, inputs, outputs, threads, opset=18)
    return lambda: (run(), output)[1]


def group_query_inputs(problem: Problem) -> dict[str, Tensor]:
    """Inputs of GroupQueryAttention in its order, the caches being the problem's own."""
    case = problem.case
    total = case.past + case.tokens
    return {
        "query": _tokens_first(problem.query),
        "key": _tokens_first(problem.key),
        "value": _tokens_first(problem.value),
        "past_key": problem.key_cache,
        "past_value": problem.value_cache,
        "seqlens_k": np.full(case.batch, total - 1, np.int32),
        "total_sequence_length": np.array([total], np.int32),
    }


def onnx_attention(problem: Problem, threads: int) -> Run:
    """Attention-23 of ONNX, on keys and values that are in one piece already, which spares it a copy."""
    case = problem.case
    scores = case.batch * case.heads * case.tokens * (case.past + case.tokens) * 4
    if 3 * scores > psutil.virtual_memory().available:
        raise SkippedError(f"its scores take {scores / 1e9:.1f} GB, several times")
    inputs = {"query": problem.query, "key": problem.key_cache, "value": problem.value_cache}
    node = helper.make_node("Attention", list(inputs), ["output"], is_causal=int(case.tokens > 1))
    output = np.empty_like(problem.query)
    run = bound_node(node, inputs, {"output": output}, threads, opset=23)
    return lambda: _tokens_first((run(), output)[1])


def torch_sdpa(problem: Problem, threads: int) -> Run:
    """torch's scaled_dot_product_attention, likewise on keys and values in one piece."""
    import torch

    case = problem.case
    torch.set_num_threads(threads)
    query, key, value = (
        torch.from_numpy(array) for array in (problem.query, problem.key_cache, problem.value_cache)
    )
    causal, grouped = case.tokens > 1, case.kv_heads < case.heads

    def run() -> Tensor:
        with torch.inference_mode():
            result = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=grouped
            )
        return _tokens_first(result.numpy())

    return run


PEERS: dict[str, Callable[[Problem, int], Run]] = {
    "ort_gqa": group_query_attention,
    "ort_attention": onnx_attention,
    "torch_sdpa": torch_sdpa,
}


def _tokens_first(array: Tensor) -> Tensor:
    """[B, H, S, D] to [B, S, H*D]; a view where S is 1, so that it costs decode nothing."""
    batch, _, tokens, _ = array.shape
    return array.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)


def bound_node(
    node: onnx.NodeProto, inputs: dict[str, Tensor], outputs: dict[str, Tensor], threads: int, *, opset: int
) -> Callable[[], None]:
    """A one-node session with its arrays bound; equal arrays are bound as one value."""

    def info(name: str, array: Tensor) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, ELEMENT_TYPES[array.dtype.name].onnx, array.shape)

    graph = helper.make_graph(
        [node], "peer", [info(*item) for item in inputs.items()], [info(*item) for item in outputs.items()]
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11 if opset > 20 else 10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads of one session must not take the cores of the next one measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:
        raise SkippedError(reason(error)) from error
    values = {id(array): ort_value(array) for array in (*inputs.values(), *outputs.values())}
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, values[id(array)])
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, values[id(array)])
    keep = (inputs, outputs, values)  # the session does not own what is bound to it

    def run() -> None:
        session.run_with_iobinding(binding)
        assert keep

    return run
