"""GPU kernels in Triton for chai::ClusteredHeadAttention, and their ahead-of-time compilation.

``clustered_head_attention`` runs the op on torch tensors; ``compile`` writes cubins and an index for another
program to launch. Needs torch and triton, nothing else of this package's dependencies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chai_export.kernels.ahead_of_time import compile
    from chai_export.kernels.launch import clustered_head_attention, workspace_bytes
    from chai_export.kernels.spec import Shape, Spec

# Public name -> module, resolved on first use: importing this package imports neither torch nor triton.
_HOME = {
    "Shape": "chai_export.kernels.spec",
    "Spec": "chai_export.kernels.spec",
    "clustered_head_attention": "chai_export.kernels.launch",
    "compile": "chai_export.kernels.ahead_of_time",
    "workspace_bytes": "chai_export.kernels.launch",
}

__all__ = ["Shape", "Spec", "clustered_head_attention", "compile", "workspace_bytes"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chai_export.kernels' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
