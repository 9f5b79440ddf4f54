"""What operators an ONNX file is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from chai_export.graph.read.load import read_model


def count_ops(path: str | Path) -> dict[str, int]:
    """Number of nodes per operator in the main graph, e.g. {"MatMul": 14, "chai::ClusteredHeadAttention": 2}.

    Bodies of functions are not counted; operators outside the default domain carry it as a prefix.

    Raises:
        ChaiError: the file is missing or damaged.
    """
    graph = read_model(Path(path)).graph
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph)
    return dict(sorted(counts.items()))
