"""The launches of one call, as data: which kernels, when, with what grid, arguments and workspace.

The Python launcher runs this list with Triton's JIT or interpreter; ahead-of-time compilation writes it into
the index beside the cubins, and the TensorRT plugin runs the same list. So every formula that C++ evaluates
is tested from Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chai_export.kernels.blocks import Blocks, padded
from chai_export.kernels.device import append, decode, head_map, prefill, probe
from chai_export.kernels.formula import Formula, Operand, cdiv, evaluate, minimum, symbols
from chai_export.kernels.spec import Shape, Spec
from chai_export.op.dtypes import ELEMENT_TYPES

WORKSPACE_ALIGNMENT = 256
FLOAT_ARGUMENTS = ("scale", "softcap")
"""Arguments that are attributes of the node; all others that are no tensors are integers."""

INT32_TENSORS = ("past_head_map", "present_head_map", "past_lengths", "lengths")
_T_TENSORS = ("query", "key", "value", "output", "present_key", "present_value")

# Query heads of one KV head that a decode program takes: more accumulators do not fit in registers.
MAX_GROUP_BLOCK = 64

B, H, G, S, R, C, P, DV, ONLINE = symbols("B H G S R C P Dv online")
SEVERAL = Formula("1") < S
"""More tokens than one in some row: prefill."""

CALL_SYMBOLS = {
    "B": "batch rows",
    "S": "new tokens",
    "R": "KV heads kept",
    "C": "cache capacity",
    "online": "attribute, 0 or 1",
}

# Integer arguments that mean the same in every kernel.
COMMON_SCALARS = {
    "tokens": S,
    "capacity": C,
    "kept": R,
    "online": ONLINE,
    "exact": ONLINE * (R < G),
}


@dataclass(frozen=True)
class Section:
    """A part of the workspace: element type (``int32``, ``float32`` or the tensors' own) and element count.

    Counts do not depend on S and never shrink when B, R or C grow, so the largest call sizes the workspace.
    """

    name: str
    dtype: str
    count: str

    def bytes(self, symbols: dict[str, int]) -> int:
        """Size in bytes, rounded up to the alignment of sections."""
        size = evaluate(self.count, symbols) * ELEMENT_TYPES[self.dtype].item_size
        return -(-size // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT


@dataclass(frozen=True)
class Launch:
    """One kernel launch. ``arguments`` are the declared ones that are not constants, in order."""

    kernel: Any
    when: str
    grid: tuple[str, str, str]
    arguments: tuple[str, ...]
    scalars: dict[str, str]
    constants: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Function name of the kernel, in Python and in the cubin."""
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Program:
    """All launches of a model's attention on one architecture, in order, and the workspace they share.

    ``tensors`` are the element types of inputs and outputs by name, ``call_symbols`` what the formulas'
    symbols mean that vary from call to call.
    """

    spec: Spec
    launches: tuple[Launch, ...]
    workspace: tuple[Section, ...]
    tensors: dict[str, str]
    call_symbols: dict[str, str]

    def workspace_bytes(self, shape: Shape) -> int:
        """Bytes of workspace for a shape; a function of B, R and C only."""
        symbols = shape.symbols(self.spec)
        return sum(section.bytes(symbols) for section in self.workspace)


def build_program(spec: Spec, blocks: Blocks) -> Program:
    """Launch list of a model with a choice of block sizes."""
    group_block = min(padded(spec.group), MAX_GROUP_BLOCK)
    group_blocks = -(-spec.group // group_block)
    constants = {
        "HEADS": spec.num_query_heads,
        "KV_HEADS": spec.num_kv_heads,
        "HEAD_DIM": spec.head_dim,
        "VALUE_DIM": spec.value_head_dim,
        "PROBE": spec.probe_tokens,
        "HEADS_PADDED": padded(spec.num_query_heads, 1),
        "KV_PADDED": padded(spec.num_kv_heads, 1),
        "HEAD_DIM_PADDED": padded(spec.head_dim),
        "VALUE_DIM_PADDED": padded(spec.value_head_dim),
        "PROBE_PADDED": padded(spec.probe_tokens),
        "GROUP_BLOCK": group_block,
        "MEMBERS": blocks.kernels["prefill"].constants["MEMBERS"],
        "INTERPRETED": int(blocks.interpreted),
    }
    tile = blocks.kernels["decode_scores"].constants["BLOCK_N"]
    tiles = cdiv(C, tile)
    score_splits = minimum(cdiv(blocks.score_programs, B * R), tiles)
    value_splits = minimum(cdiv(blocks.value_programs, B * G), tiles)
    block_m = blocks.kernels["prefill"].constants["BLOCK_M"]
    block_tokens = blocks.kernels["append"].constants["BLOCK_TOKENS"]

    def launch(
        name: str,
        kernel: Any,
        when: Formula,
        grid: tuple[Operand, Operand, Operand],
        scalars: dict[str, Formula] | None = None,
    ) -> Launch:
        chosen = blocks.kernels[name]
        declared = parameters(kernel)
        available = constants | chosen.constants
        if "BLOCK_N" in declared and name.startswith("decode"):
            available = available | {"BLOCK_N": tile}
        arguments = tuple(p for p, is_constant in declared.items() if not is_constant)
        return Launch(
            kernel=kernel,
            when=str(when),
            grid=(str(grid[0]), str(grid[1]), str(grid[2])),
            arguments=arguments,
            scalars={a: str(f) for a, f in (COMMON_SCALARS | (scalars or {})).items() if a in arguments},
            constants={p: available[p] for p, is_constant in declared.items() if is_constant},
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )

    one = S.equals(1)
    launches = (
        launch("probe", probe.probe_kernel, SEVERAL * ONLINE * (R < G), (H, B, 1)),
        launch("head_map", head_map.head_map_kernel, SEVERAL, (B, 1, 1)),
        launch("append", append.append_kernel, SEVERAL, (cdiv(S, block_tokens), G, B)),
        launch("prefill", prefill.prefill_kernel, SEVERAL, (cdiv(S, block_m), H, B)),
        launch("decode_begin", append.decode_begin_kernel, one, (G, B, 1)),
        launch("decode_scores", decode.decode_scores_kernel, one, (score_splits, R * group_blocks, B)),
        launch("decode_values", decode.decode_values_kernel, one, (value_splits, G * group_blocks, B)),
        launch("decode_merge", decode.decode_merge_kernel, one, (H, B, 1), {"splits": value_splits}),
    )
    # B * splits is at most programs / G + B: an upper bound that does not shrink as B grows.
    partials = (cdiv(blocks.value_programs, G) + B) * H
    score_rows = B * R * cdiv(H, G) * tiles
    workspace = (
        Section("plan", "int32", str(B * (G * 2 + H * 2 + 1))),
        Section("quantised", "int32", str(B * P * P * H)),
        Section("weights", spec.dtype, str(score_rows * tile)),
        Section("tile_max", "float32", str(score_rows)),
        Section("tile_sum", "float32", str(score_rows)),
        Section("partial", "float32", str(partials * DV)),
        Section("partial_max", "float32", str(partials)),
        Section("partial_sum", "float32", str(partials)),
    )
    types = dict.fromkeys(_T_TENSORS, spec.dtype) | dict.fromkeys(INT32_TENSORS, "int32")
    return Program(spec, launches, workspace, types, CALL_SYMBOLS)


def parameters(kernel: Any) -> dict[str, bool]:
    """Parameter names of a kernel in order, and whether each is a compile-time constant."""
    function: Callable[..., Any] = kernel.fn
    return {
        name: "constexpr" in str(parameter.annotation)
        for name, parameter in inspect.signature(function).parameters.items()
    }
