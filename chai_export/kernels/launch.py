"""The op on torch tensors: checks shapes, cuts the workspace, runs the launches of :mod:`.program`.

CUDA tensors run the compiled kernels on the current stream. CPU tensors run them in Triton's interpreter,
which needs ``TRITON_INTERPRET=1`` set before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from triton.runtime.interpreter import InterpretedFunction

from chai_export.errors import ChaiError
from chai_export.kernels.blocks import INTERPRETER, Blocks, choose
from chai_export.kernels.formula import evaluate
from chai_export.kernels.program import Program, build_program
from chai_export.kernels.spec import Shape, Spec
from chai_export.op.dtypes import ELEMENT_TYPES
from chai_export.op.probe import PAPER_PROBE_TOKENS

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ELEMENT_TYPES}


class Result(NamedTuple):
    """The four outputs of the op; shapes and dtypes as in :mod:`chai_export.op.schema`."""

    output: torch.Tensor
    present_key: torch.Tensor
    present_value: torch.Tensor
    present_head_map: torch.Tensor


def clustered_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    past_head_map: torch.Tensor,
    past_lengths: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float = 0.0,
    probe_tokens: int = PAPER_PROBE_TOKENS,
    online: bool = True,
    output: torch.Tensor | None = None,
    present_key: torch.Tensor | None = None,
    present_value: torch.Tensor | None = None,
    present_head_map: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> Result:
    """Clustered head attention, version 1 (design: :mod:`chai_export.op`), on a GPU.

    Pass ``past_key`` as ``present_key`` and ``past_value`` as ``present_value`` to append in place; other
    tensors are filled with a copy first. What is not passed is allocated; with all four outputs and the
    workspace passed nothing is, and the call can be captured in a CUDA graph (after one call outside it,
    which compiles). Nothing here waits for the device.

    Args:
        query: T [B, H, S, D], after RoPE; T is float32, float16 or bfloat16. All tensors are contiguous.
        key: T [B, G, S, D], new tokens, all KV heads.
        value: T [B, G, S, Dv].
        past_key: T [B, R, C, D].
        past_value: T [B, G, C, Dv].
        past_head_map: int32 [B, H].
        past_lengths: int32 [B].
        lengths: int32 [B], 0 … S.
        scale: factor on the scores; 0 means 1/sqrt(D).
        probe_tokens: P.
        online: cluster fresh rows.
        output: T [B, S, H*Dv] to write to.
        present_key: T like ``past_key``.
        present_value: T like ``past_value``.
        present_head_map: int32 [B, H], not ``past_head_map`` itself.
        workspace: uint8 of :func:`workspace_bytes` elements or more; its content does not matter.
        blocks: block sizes other than the recorded choice (for tuning).

    A row with past_lengths + lengths > C is treated as inactive: nothing in memory is touched for it.

    Raises:
        ChaiError: shapes, dtypes or devices that do not go together, or no GPU and no interpreter.
    """
    batch, heads, tokens, head_dim = query.shape
    spec = Spec(heads, key.shape[1], head_dim, value.shape[3], dtype_name(query.dtype), probe_tokens)
    shape = Shape(batch, tokens, past_key.shape[1], past_key.shape[2])
    program = _program(spec, architecture_of(query), blocks)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "past_head_map": past_head_map,
        "past_lengths": past_lengths,
        "lengths": lengths,
        "output": query.new_empty(batch, tokens, heads * value.shape[3]) if output is None else output,
        "present_key": torch.empty_like(past_key) if present_key is None else present_key,
        "present_value": torch.empty_like(past_value) if present_value is None else present_value,
        "present_head_map": torch.empty_like(past_head_map) if present_head_map is None else present_head_map,
    }
    _check(spec, shape, {**tensors, "past_key": past_key, "past_value": past_value})
    needed = program.workspace_bytes(shape)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.uint8, device=query.device)
    elif workspace.numel() < needed or workspace.dtype != torch.uint8:
        raise ChaiError(f"workspace must be uint8 with at least {needed} elements; see workspace_bytes()")
    for past, present in ((past_key, "present_key"), (past_value, "present_value")):
        if past.data_ptr() != tensors[present].data_ptr():
            tensors[present].copy_(past)
    run(program, shape, tensors, workspace, scale=scale or head_dim**-0.5, online=online)
    return Result(*(tensors[name] for name in Result._fields))


def workspace_bytes(spec: Spec, shape: Shape, architecture: int | str) -> int:
    """Bytes of workspace that a call needs; independent of S, and never less for a larger B, R or C."""
    return _program(spec, architecture, None).workspace_bytes(shape)


def run(
    program: Program,
    shape: Shape,
    tensors: dict[str, torch.Tensor],
    workspace: torch.Tensor,
    *,
    scale: float,
    online: bool,
    only: str = "",
) -> None:
    """Run a program's launches, or only the kernel of one name: no checks, no allocation, no synchronisation.

    ``tensors`` holds inputs and outputs by name, with the caches as ``present_key`` and ``present_value``.
    """
    symbols = shape.symbols(program.spec) | {"online": int(online)}
    run_launches(program, symbols, tensors, workspace, {"scale": scale}, only)


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


@lru_cache(maxsize=64)
def _cached_program(spec: Spec, architecture: int | str) -> Program:
    return build_program(spec, choose(spec, architecture))


def _program(spec: Spec, architecture: int | str, blocks: Blocks | None) -> Program:
    return _cached_program(spec, architecture) if blocks is None else build_program(spec, blocks)


def architecture_of(tensor: torch.Tensor) -> int | str:
    """Compute capability that a tensor's kernels are chosen for, or the interpreter.

    Raises:
        ChaiError: no GPU and no interpreter.
    """
    from chai_export.kernels.device.decode import decode_merge_kernel

    interpreted = isinstance(decode_merge_kernel, InterpretedFunction)
    if tensor.device.type == "cuda" and not interpreted:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return major * 10 + minor
    if tensor.device.type == "cpu" and interpreted:
        return INTERPRETER
    raise ChaiError(
        f"the GPU kernels cannot run on {tensor.device}; use CUDA tensors, or CPU tensors with "
        "TRITON_INTERPRET=1 set before triton is imported"
    )


def _check(spec: Spec, shape: Shape, tensors: dict[str, torch.Tensor]) -> None:
    batch, tokens, kept, capacity = shape.batch, shape.tokens, shape.kept, shape.capacity
    heads, kv_heads = spec.num_query_heads, spec.num_kv_heads
    key_cache = (batch, kept, capacity, spec.head_dim)
    value_cache = (batch, kv_heads, capacity, spec.value_head_dim)
    expected = {
        "query": (batch, heads, tokens, spec.head_dim),
        "key": (batch, kv_heads, tokens, spec.head_dim),
        "value": (batch, kv_heads, tokens, spec.value_head_dim),
        "past_key": key_cache,
        "past_value": value_cache,
        "past_head_map": (batch, heads),
        "past_lengths": (batch,),
        "lengths": (batch,),
        "output": (batch, tokens, heads * spec.value_head_dim),
        "present_key": key_cache,
        "present_value": value_cache,
        "present_head_map": (batch, heads),
    }
    if not 1 <= kept <= kv_heads:
        raise ChaiError(f"past_key keeps {kept} KV heads; it must keep between 1 and {kv_heads}")
    types = {name: "int32" if name.endswith(("lengths", "head_map")) else spec.dtype for name in expected}
    check_tensors(tensors, expected, types)


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
