"""Runs the op's cases on the kernels and compares with float64; tests and ``benchmarks/gpu.py`` share it.

bfloat16 travels as float32 arrays that hold bfloat16 values, so that a machine with torch, Triton and NumPy
alone can check it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chai_export.kernels.launch import TORCH_DTYPES, Result, clustered_head_attention
from chai_export.op.cases import ROUNDING_MARGIN, Case, check
from chai_export.op.head_map import QUANTISATION_STEPS, probe_probabilities
from chai_export.op.reference import AttentionResult

Arrays = dict[str, NDArray[Any]]


def case_inputs(case: Case, dtype: str) -> Arrays:
    """A case's inputs as NumPy arrays; for bfloat16 as float32 arrays of bfloat16 values."""
    if dtype != "bfloat16":
        return dict(case.inputs(dtype))
    inputs = {name: _round_to_bfloat16(array) for name, array in case.inputs("float32").items()}
    for row, (past, new) in enumerate(case.rows):
        if case.online and past == 0 and new > 0:
            _keep_rounding_margin(case, inputs["query"][row], inputs["key"][row], min(case.probe_tokens, new))
    return inputs


def to_tensors(inputs: Mapping[str, NDArray[Any]], dtype: str, device: str) -> dict[str, torch.Tensor]:
    """The inputs as contiguous torch tensors, the float ones in ``dtype``."""
    tensors = {}
    for name, array in inputs.items():
        wanted = torch.int32 if array.dtype == np.int32 else TORCH_DTYPES[dtype]
        tensors[name] = torch.from_numpy(array.copy()).to(device=device, dtype=wanted)
    return tensors


def check_result(case: Case, inputs: Arrays, result: Result, dtype: str) -> None:
    """Compare a result with the float64 reference and the caches bit by bit.

    Raises:
        AssertionError: naming the case, the output and the worst difference.
    """
    as_arrays = [tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in result]
    check(case, inputs, AttentionResult(*(tensor.cpu().numpy() for tensor in as_arrays)), dtype)


def run_case(case: Case, dtype: str, device: str, **options: Any) -> None:
    """Run one case with new output tensors and check it; ``options`` go to the launcher."""
    inputs = case_inputs(case, dtype)
    arguments: dict[str, Any] = {**to_tensors(inputs, dtype, device), **options}
    arguments |= {"scale": case.scale, "probe_tokens": case.probe_tokens, "online": case.online}
    result = clustered_head_attention(**arguments)
    check_result(case, inputs, result, dtype)


def _round_to_bfloat16(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype != np.float32:
        return array
    rounded: NDArray[Any] = torch.from_numpy(array).bfloat16().float().numpy()
    return rounded


def _keep_rounding_margin(case: Case, query: NDArray[Any], key: NDArray[Any], probe: int) -> None:
    """Shrink single probe queries, in place, until no probability is near where its rounding flips.

    The case does this for its own values; rounding them to bfloat16 moves the probabilities.
    """
    scale = case.scale or case.head_dim**-0.5
    while True:
        steps = probe_probabilities(query[:, :probe], key[:, :probe], scale) * QUANTISATION_STEPS
        near = np.abs(steps - np.floor(steps) - 0.5) < ROUNDING_MARGIN
        unsafe = np.argwhere(near.any(axis=2))
        if not len(unsafe):
            return
        for head, token in unsafe:
            query[head, token] = _round_to_bfloat16(query[head, token] * np.float32(0.96875))
