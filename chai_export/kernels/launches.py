"""The launches of one call; see :mod:`chai_export.kernels.program`.

A decode step is two launches, a prefill step four.
"""

from __future__ import annotations

from typing import Any

from chai_export.kernels.blocks import Blocks, padded
from chai_export.kernels.device import append, decode_scores, decode_values, head_map, prefill, probe
from chai_export.kernels.formula import Formula, Operand, cdiv, minimum, symbols
from chai_export.kernels.program import Launch, Program, Section, parameters
from chai_export.kernels.spec import Spec
from chai_export.op.storage import Storage

B, H, G, S, R, C, N, L, P, DV = symbols("B H G S R C N L P Dv")
ONLINE, WINDOW = symbols("online window")

SEVERAL = Formula("1") < S
"""More tokens than one in some row: prefill."""

INT32_TENSORS = ("past_head_map", "present_head_map", "past_lengths", "lengths", "page_table")

# Query heads of one KV head that a decode program takes: more accumulators do not fit in registers.
_MAX_GROUP_BLOCK = 64

_CALL_SYMBOLS = {
    "B": "batch rows",
    "S": "new tokens",
    "R": "KV heads kept",
    "C": "capacity of a row, pages per row times L",
    "N": "pages in the pools",
    "L": "positions per page",
    "online": "attribute, 0 or 1",
    "window": "attribute, 0 is none",
}


def build_program(spec: Spec, blocks: Blocks) -> Program:
    """Launch list of a layer with a choice of block sizes."""
    prefill_blocks = blocks.kernels["prefill"].constants
    group_block = min(padded(spec.group), _MAX_GROUP_BLOCK)
    group_blocks = -(-spec.group // group_block)
    tile = blocks.kernels["decode_scores"].constants["BLOCK_N"]
    members = 1 if spec.slopes else prefill_blocks["MEMBERS"]
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
        "KEY_BITS": spec.key_bits,
        "VALUE_BITS": spec.value_bits,
        "GROUP": spec.group_size,
        "SOFTCAP": int(spec.softcap),
        "SINKS": int(spec.sinks),
        "SLOPES": int(spec.slopes),
        "GROUP_BLOCK": group_block,
        "INTERPRETED": int(blocks.interpreted),
        "BLOCK_TOKENS": blocks.kernels["append"].constants["BLOCK_TOKENS"],
        "BLOCK_SPLITS": blocks.kernels["decode_values"].constants["BLOCK_SPLITS"],
    }
    absent: dict[str, Any] = {f"{name}_ptr": None for name in _absent(spec)}
    tiles = cdiv(C, tile)
    score_splits = minimum(cdiv(blocks.score_programs, B * R), tiles)
    value_splits = minimum(cdiv(blocks.value_programs, B * G), tiles)
    exact = ONLINE * (R < G) if spec.stored_as_given else ONLINE
    scalars = {
        "tokens": S,
        "capacity": C,
        "kept": R,
        "pages": N,
        "page_length": L,
        "window": WINDOW,
        "online": ONLINE,
        "exact": exact,
    }

    def launch(name: str, kernel: Any, when: Formula, grid: tuple[Operand, Operand, Operand]) -> Launch:
        chosen = blocks.kernels[name]
        declared = parameters(kernel)
        own = {"BLOCK_N": tile if name.startswith("decode") else prefill_blocks["BLOCK_N"]}
        available = constants | own | chosen.constants | {"MEMBERS": members} | absent
        arguments = tuple(p for p, is_constant in declared.items() if not is_constant and p not in absent)
        return Launch(
            kernel=kernel,
            when=str(when),
            grid=(str(grid[0]), str(grid[1]), str(grid[2])),
            arguments=arguments,
            scalars={argument: str(f) for argument, f in scalars.items() if argument in arguments},
            constants={p: available[p] for p in declared if p not in arguments},
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )

    one = S.equals(1)
    block_tokens = constants["BLOCK_TOKENS"]
    launches = (
        launch("probe", probe.probe_kernel, SEVERAL * exact, (H, B, 1)),
        launch("head_map", head_map.head_map_kernel, SEVERAL, (B, 1, 1)),
        launch("append", append.append_kernel, SEVERAL, (cdiv(S, block_tokens), G, B)),
        launch("prefill", prefill.prefill_kernel, SEVERAL, (cdiv(S, prefill_blocks["BLOCK_M"]), H, B)),
        launch("decode_scores", decode_scores.decode_scores_kernel, one, (score_splits, R * group_blocks, B)),
        launch("decode_values", decode_values.decode_values_kernel, one, (value_splits, G * group_blocks, B)),
    )
    # B * splits is at most programs / G + B: an upper bound that does not shrink as B grows.
    partials = (cdiv(blocks.value_programs, G) + B) * H
    workspace = (
        Section("plan", "int32", str(B * (G * 2 + H * 2 + 1))),
        Section("quantised", "int32", str(B * P * P * H)),
        Section("scores", "float32", str(B * R * cdiv(H, G) * tiles * tile)),
        Section("partial", "float32", str(partials * DV)),
        Section("partial_max", "float32", str(partials)),
        Section("partial_sum", "float32", str(partials)),
        Section("counters", "int32", str(B * G * group_blocks)),
    )
    return Program(spec, launches, workspace, tensor_types(spec), _CALL_SYMBOLS)


def tensor_types(spec: Spec) -> dict[str, str]:
    """Element type of every input and output that a node of this form has, by name."""
    types = dict.fromkeys(("query", "key", "value", "output", "sinks"), spec.dtype)
    types |= dict.fromkeys(INT32_TENSORS, "int32")
    types |= {"alibi_slopes": "float32", "key_scales": "float16", "value_scales": "float16"}
    types |= {
        "key_cache": _stored_type(spec.storage_k, spec.dtype),
        "value_cache": _stored_type(spec.storage_v, spec.dtype),
    }
    return {name: dtype for name, dtype in types.items() if name not in _absent(spec)}


def _stored_type(storage: Storage, dtype: str) -> str:
    return {16: "float16", 8: "int8", 4: "uint8"}.get(storage.bits, dtype)


def _absent(spec: Spec) -> set[str]:
    present = {
        "key_scales": spec.storage_k.quantised,
        "value_scales": spec.storage_v.quantised,
        "sinks": spec.sinks,
        "alibi_slopes": spec.slopes,
    }
    return {name for name, is_there in present.items() if not is_there}
