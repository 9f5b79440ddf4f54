"""Runs the cases of the op on the kernels and compares with float64; tests and benchmarks share it.

bfloat16 arrays become torch tensors and back through their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chai_export.kernels.launch import Result, clustered_head_attention
from chai_export.op.cases import CACHES, Case, check
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.reference import AttentionResult

Arrays = Mapping[str, NDArray[Any]]


def to_tensors(inputs: Arrays, device: str) -> dict[str, torch.Tensor | None]:
    """The inputs as contiguous torch tensors; caches that the case does not have are None."""
    absent: dict[str, torch.Tensor | None] = dict.fromkeys(CACHES)
    return absent | {name: to_tensor(array, device) for name, array in inputs.items()}


def to_tensor(array: NDArray[Any], device: str) -> torch.Tensor:
    """A copy of an array, of the same type."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)


def to_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor as an array of the same type."""
    on_host = tensor.cpu()
    if on_host.dtype != torch.bfloat16:
        return on_host.numpy()
    bits: NDArray[Any] = on_host.view(torch.int16).numpy().view(ELEMENT_TYPES["bfloat16"].numpy)
    return bits


def check_result(case: Case, inputs: Arrays, result: Result, dtype: str) -> None:
    """Compare a result with the float64 reference, the pools bit by bit.

    Raises:
        AssertionError: naming the case, the output and the worst difference.
    """
    arrays = [None if tensor is None else to_array(tensor) for tensor in result]
    check(case, inputs, AttentionResult(*arrays), dtype)  # type: ignore[arg-type]


def run_case(case: Case, dtype: str, device: str, **options: Any) -> None:
    """Run one case on copies of its pools and check it; ``options`` go to the launcher."""
    inputs = case.inputs(dtype)
    arguments: dict[str, Any] = {**to_tensors(inputs, device), **options}
    result = clustered_head_attention(**arguments, attributes=case.attributes)
    check_result(case, inputs, result, dtype)
