"""Version 2 of the op on torch tensors: checks shapes, cuts the workspace, runs the launches.

CUDA tensors run the compiled kernels on the current stream. CPU tensors run them in Triton's interpreter,
which needs ``TRITON_INTERPRET=1`` set before Triton is imported.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from chai_export.errors import ChaiError
from chai_export.kernels.blocks import Blocks, choose
from chai_export.kernels.launches import build_program, tensor_types
from chai_export.kernels.program import Program
from chai_export.kernels.run import architecture_of, check_tensors, dtype_name, run_launches
from chai_export.kernels.spec import Shape, Spec
from chai_export.op.attributes import Attributes


class Result(NamedTuple):
    """The outputs of the op; shapes and dtypes as in docs/op.md. Scales are None where there are none."""

    output: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None
    present_head_map: torch.Tensor


def clustered_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    page_table: torch.Tensor,
    past_head_map: torch.Tensor,
    past_lengths: torch.Tensor,
    lengths: torch.Tensor,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    *,
    attributes: Attributes,
    output: torch.Tensor | None = None,
    present_head_map: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> Result:
    """Clustered head attention (docs/op.md) on a GPU; the pools are appended to in place.

    What is not passed is allocated; with the output, the map and the workspace passed nothing is, and the
    call can be captured in a CUDA graph (after one call outside it, which compiles). Nothing here waits for
    the device.

    Args:
        query: T [B, H, S, D], after RoPE; T is float32, float16 or bfloat16. All tensors are contiguous.
        key: T [B, G, S, D], new tokens, all KV heads.
        value: T [B, G, S, Dv].
        key_cache: pool of pages [N, R, L, D], or uint8 [N, R, L, D/2] for 4 bits.
        value_cache: likewise [N, G, L, Dv] or [N, G, L, Dv/2].
        key_scales: float16 [N, R, L, D/group], for 4 bits twice as wide; None for T and float16.
        value_scales: likewise.
        page_table: int32 [B, M].
        past_head_map: int32 [B, H].
        past_lengths: int32 [B].
        lengths: int32 [B], 0 … S.
        sinks: T [H], or None.
        alibi_slopes: float32 [H], or None.
        attributes: of the node.
        output: T [B, S, H*Dv] to write to.
        present_head_map: int32 [B, H], not ``past_head_map`` itself.
        workspace: uint8 of :func:`workspace_bytes` elements or more; its content does not matter.
        blocks: block sizes other than the recorded choice (for tuning).

    A row with past_lengths + lengths > M*L is treated as inactive, and a page that is none of the pool is
    neither read nor written: then that row's output is unspecified.

    Raises:
        ChaiError: shapes, dtypes or devices that do not go together, or no GPU and no interpreter.
    """
    batch, heads, tokens, head_dim = query.shape
    attributes.check()
    spec = Spec(
        heads,
        key.shape[1],
        head_dim,
        value.shape[3],
        dtype_name(query.dtype),
        attributes.probe_tokens,
        key_bits=attributes.key_bits,
        value_bits=attributes.value_bits,
        group_size=attributes.group,
        softcap=attributes.softcap > 0,
        sinks=sinks is not None,
        slopes=alibi_slopes is not None,
    )
    num_pages, kept, page_length = key_cache.shape[:3]
    shape = Shape(batch, tokens, kept, page_table.shape[1] * page_length, num_pages, page_length)
    program = _program(spec, architecture_of(query), blocks)
    given = {
        "query": query,
        "key": key,
        "value": value,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "page_table": page_table,
        "past_head_map": past_head_map,
        "past_lengths": past_lengths,
        "lengths": lengths,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "output": query.new_empty(batch, tokens, heads * value.shape[3]) if output is None else output,
        "present_head_map": torch.empty_like(past_head_map) if present_head_map is None else present_head_map,
    }
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    _check(spec, shape, tensors)
    needed = program.workspace_bytes(shape)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.uint8, device=query.device)
    elif workspace.numel() < needed or workspace.dtype != torch.uint8:
        raise ChaiError(f"workspace must be uint8 with at least {needed} elements; see workspace_bytes()")
    symbols = shape.symbols(spec) | {"online": int(attributes.online), "window": attributes.window}
    floats = {"scale": attributes.factor(head_dim), "softcap": attributes.softcap}
    run_launches(program, symbols, tensors, workspace, floats)
    return Result(
        tensors["output"], key_cache, value_cache, key_scales, value_scales, tensors["present_head_map"]
    )


def workspace_bytes(spec: Spec, shape: Shape, architecture: int | str) -> int:
    """Bytes of workspace that a call needs; independent of S, and never less for a larger B, R or C."""
    return _program(spec, architecture, None).workspace_bytes(shape)


@lru_cache(maxsize=64)
def _cached_program(spec: Spec, architecture: int | str) -> Program:
    return build_program(spec, choose(spec, architecture))


def _program(spec: Spec, architecture: int | str, blocks: Blocks | None) -> Program:
    return _cached_program(spec, architecture) if blocks is None else build_program(spec, blocks)


def _check(spec: Spec, shape: Shape, tensors: dict[str, torch.Tensor]) -> None:
    batch, tokens, heads, kv_heads = shape.batch, shape.tokens, spec.num_query_heads, spec.num_kv_heads
    if not 1 <= shape.kept <= kv_heads:
        raise ChaiError(f"key_cache keeps {shape.kept} KV heads; it must keep between 1 and {kv_heads}")
    types = tensor_types(spec)
    pages = (shape.pages, kv_heads, shape.page_length)
    kept_pages = (shape.pages, shape.kept, shape.page_length)
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch, heads, tokens, spec.head_dim),
        "key": (batch, kv_heads, tokens, spec.head_dim),
        "value": (batch, kv_heads, tokens, spec.value_head_dim),
        "key_cache": (*kept_pages, spec.storage_k.columns),
        "value_cache": (*pages, spec.storage_v.columns),
        "key_scales": (*kept_pages, spec.storage_k.scale_columns),
        "value_scales": (*pages, spec.storage_v.scale_columns),
        "page_table": (batch, shape.row_pages),
        "past_head_map": (batch, heads),
        "past_lengths": (batch,),
        "lengths": (batch,),
        "sinks": (heads,),
        "alibi_slopes": (heads,),
        "output": (batch, tokens, heads * spec.value_head_dim),
        "present_head_map": (batch, heads),
    }
    for name in shapes:
        if (name in types) != (name in tensors):
            wanted = "is missing" if name in types else "is given"
            raise ChaiError(
                f"{name} {wanted}, but keys are stored in {spec.key_bits} bits and values in "
                f"{spec.value_bits} (0: as they are)"
            )
    check_tensors(tensors, {name: dims for name, dims in shapes.items() if name in types}, types)
