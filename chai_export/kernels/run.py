"""Runs the launches of a program on torch tensors: no checks, no allocation, no synchronisation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from triton.runtime.interpreter import InterpretedFunction

from chai_export.errors import ChaiError
from chai_export.kernels.blocks import INTERPRETER
from chai_export.kernels.formula import evaluate
from chai_export.kernels.program import Program
from chai_export.op.dtypes import ELEMENT_TYPES

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ELEMENT_TYPES}


def run_launches(
    program: Program,
    symbols: dict[str, int],
    tensors: dict[str, torch.Tensor],
    workspace: torch.Tensor,
    floats: Mapping[str, float],
    only: str = "",
) -> None:
    """Run a program's launches, or only the kernel of one name, for the values of all symbols and floats."""
    bound = dict(tensors)
    offset = 0
    for section in program.workspace:
        size = section.bytes(symbols)
        bound[section.name] = workspace[offset : offset + size].view(TORCH_DTYPES[section.dtype])
        offset += size
    for launch in program.launches:
        if not evaluate(launch.when, symbols) or (only and launch.name != only):
            continue
        arguments: dict[str, torch.Tensor | int | float] = {}
        for name in launch.arguments:
            if name in floats:
                arguments[name] = floats[name]
            elif name in launch.scalars:
                arguments[name] = evaluate(launch.scalars[name], symbols)
            else:
                arguments[name] = bound[name.removesuffix("_ptr")]
        grid = tuple(evaluate(formula, symbols) for formula in launch.grid)
        launch.kernel[grid](
            **arguments, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages
        )


def architecture_of(tensor: torch.Tensor) -> int | str:
    """Compute capability that a tensor's kernels are chosen for, or the interpreter.

    Raises:
        ChaiError: no GPU and no interpreter.
    """
    from chai_export.kernels.device.head_map import head_map_kernel

    interpreted = isinstance(head_map_kernel, InterpretedFunction)
    if tensor.device.type == "cuda" and not interpreted:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return major * 10 + minor
    if tensor.device.type == "cpu" and interpreted:
        return INTERPRETER
    raise ChaiError(
        f"the GPU kernels cannot run on {tensor.device}; use CUDA tensors, or CPU tensors with "
        "TRITON_INTERPRET=1 set before triton is imported"
    )


def check_tensors(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]
) -> None:
    """Raise ChaiError naming the first tensor of another shape, type or device than wanted, or strided."""
    device = tensors["query"].device
    for name, wanted in shapes.items():
        tensor, dtype = tensors[name], TORCH_DTYPES[types[name]]
        if tuple(tensor.shape) != wanted or tensor.dtype != dtype:
            found = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            raise ChaiError(f"{name} is {found}; it must be {dtype_name(dtype)} {list(wanted)}")
        if tensor.device != device or not tensor.is_contiguous():
            raise ChaiError(
                f"{name} must be contiguous and on {device}; call .to({str(device)!r}).contiguous() on it"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype as :data:`chai_export.op.dtypes.ELEMENT_TYPES` names it."""
    return str(dtype).removeprefix("torch.")
