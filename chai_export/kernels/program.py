"""What the launches of one call are, as data: kernels, when, with what grid, arguments and workspace.

The Python launcher runs this list with Triton's JIT or interpreter; ahead-of-time compilation writes it into
the index beside the cubins, and the TensorRT plugin runs the same list. So every formula that C++ evaluates
is tested from Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chai_export.kernels.formula import evaluate
from chai_export.kernels.spec import Shape, Spec
from chai_export.op.dtypes import ELEMENT_TYPES

WORKSPACE_ALIGNMENT = 256
FLOAT_ARGUMENTS = ("scale", "softcap")
"""Arguments that are attributes of the node; all others that are no tensors are integers."""


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
    """All launches of a layer's attention on one architecture, in order, and the workspace they share.

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


def parameters(kernel: Any) -> dict[str, bool]:
    """Parameter names of a kernel in order, and whether each is a compile-time constant."""
    function: Callable[..., Any] = kernel.fn
    return {
        name: "constexpr" in str(parameter.annotation)
        for name, parameter in inspect.signature(function).parameters.items()
    }
