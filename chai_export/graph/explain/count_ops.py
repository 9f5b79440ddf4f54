"""What operators an ONNX file is made of."""

from __future__ import annotations

from pathlib import Path

from chai_export.bundle.op_nodes import op_counts
from chai_export.graph.read.load import read_model


def count_ops(path: str | Path) -> dict[str, int]:
    """Number of nodes per operator in the main graph, see :func:`op_counts`; bodies of functions not counted.

    Raises:
        ChaiError: the file is missing or damaged.
    """
    return op_counts(read_model(Path(path)).graph)
