"""Block sizes, warps and split targets per architecture: read from ``blocks.json``, never from code.

The file holds named tables and, per architecture, which table it uses. Of a table's rules the first whose
``item_bytes`` and ``max_dim`` (padded head dim) fit a model counts. ``benchmarks/gpu_tune.py`` writes tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from chai_export.errors import ChaiError
from chai_export.kernels.spec import Spec

BLOCKS_FILE = Path(__file__).with_name("blocks.json")
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class KernelBlocks:
    """Block constants of one kernel (names as in its signature) and how it is compiled."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Blocks:
    """The choice for one model on one architecture; the targets are programs per launch, for the splits."""

    kernels: dict[str, KernelBlocks]
    score_programs: int
    value_programs: int
    interpreted: bool = False


@cache
def _file() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(BLOCKS_FILE.read_text())
    return content


def architectures() -> list[int]:
    """Compute capabilities (80, 90, …) that the file has a choice for."""
    return sorted(int(name) for name in _file()["architectures"] if name != INTERPRETER)


def padded(dim: int, least: int = 16) -> int:
    """The power of two that a block of ``dim`` columns occupies; matrix products want at least 16."""
    return max(least, 1 << (dim - 1).bit_length())


def choose(spec: Spec, architecture: int | str) -> Blocks:
    """The choice for a model and a compute capability (or ``"interpreter"``).

    Raises:
        ChaiError: no table for this architecture, or no rule for this model.
    """
    entry = _file()["architectures"].get(str(architecture))
    if entry is None:
        known = ", ".join(f"sm_{number}" for number in architectures())
        raise ChaiError(
            f"no kernels for sm_{architecture}; supported are {known} (chai_export/kernels/blocks.json)"
        )
    dim = max(padded(spec.head_dim), padded(spec.value_head_dim))
    for rule in _file()["tables"][entry["table"]]:
        if spec.item_bytes in rule["item_bytes"] and dim <= rule["max_dim"]:
            return from_json({**entry, **rule})
    raise ChaiError(
        f"no kernel blocks for head dim {dim} with {spec.dtype}; add a rule to kernels/blocks.json"
    )


def from_json(data: dict[str, Any]) -> Blocks:
    """A choice from its JSON form: ``kernels`` of one rule plus the program targets of its architecture."""
    kernels = {
        name: KernelBlocks(
            constants={key: value for key, value in fields.items() if key.isupper()},
            num_warps=fields["num_warps"],
            num_stages=fields.get("num_stages", 1),
        )
        for name, fields in data["kernels"].items()
    }
    return Blocks(kernels, data["score_programs"], data["value_programs"], data["table"] == INTERPRETER)
