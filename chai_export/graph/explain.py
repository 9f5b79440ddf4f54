"""What the rewrite sees in a graph, as a table: one row per attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from chai_export.graph.find import Survey
from chai_export.graph.site import AttentionSite, Refusal
from chai_export.op.schema import DOMAIN, OP_TYPE


@dataclass(frozen=True)
class Explanation:
    """The result of ``rewrite --explain``.

    ``problem`` is what stands in the way of the whole graph (None if nothing does); ``kept_heads`` the R of
    each layer when clusters were given.
    """

    path: str
    survey: Survey
    ops: dict[str, int]
    problem: str | None = None
    kept_heads: Sequence[int] | None = None

    columns: ClassVar[list[str]] = ["layer", "form", "heads", "R", "matched", "nearest miss"]

    @property
    def rewritable(self) -> bool:
        """Whether every attention matched and nothing else is in the way."""
        return self.problem is None and bool(self.survey.sites) and not self.survey.refusals

    @property
    def verdict(self) -> str:
        """One sentence: can it be rewritten, and if not, why."""
        if self.problem is not None:
            return f"cannot be rewritten: {self.problem}"
        if not self.survey.findings and self.ops.get(f"{DOMAIN}::{OP_TYPE}"):
            return "cannot be rewritten: it has been already; its attentions are ClusteredHeadAttention nodes"
        if not self.survey.findings:
            return "cannot be rewritten: no attention found"
        if self.survey.refusals:
            worst = self.survey.refusals[0]
            return f"cannot be rewritten: {worst.where()}: {worst.reason}"
        return f"can be rewritten: {len(self.survey.sites)} attentions"

    def rows(self) -> list[tuple[str, ...]]:
        """One row per attention, as text, in the order of :attr:`columns`."""
        return [tuple(str(row[name.replace(" ", "_")]) for name in self.columns) for row in self._rows()]

    def to_json(self) -> dict[str, Any]:
        """JSON object of ``inspect --json`` for an ONNX file."""
        return {
            "kind": "onnx",
            "path": self.path,
            "rewritable": self.rewritable,
            "verdict": self.verdict,
            "num_layers": len(self.survey.findings),
            "attentions": self._rows(),
            "ops": self.ops,
        }

    def _rows(self) -> list[dict[str, Any]]:
        return [self._row(index, finding) for index, finding in enumerate(self.survey.findings)]

    def _row(self, index: int, finding: AttentionSite | Refusal) -> dict[str, Any]:
        kept = self.kept_heads[index] if self.kept_heads and index < len(self.kept_heads) else ""
        if isinstance(finding, Refusal):
            node = finding.node or finding.anchor
            miss = f"{node.op_type} {node.name!r}: {finding.reason}"
            return {
                "layer": index,
                "form": "",
                "heads": "",
                "R": kept,
                "matched": "",
                "nearest_miss": miss,
            }
        heads = f"{finding.num_query_heads} query, {finding.num_kv_heads} KV, dim {finding.head_dim}"
        matched = f"{finding.anchor.op_type} {finding.anchor.name!r}, scale {finding.scale:.6g}"
        if finding.source_layer is not None:
            matched += f", reads the cache of layer {finding.source_layer}"
        return {
            "layer": index,
            "form": finding.form,
            "heads": heads,
            "R": kept,
            "matched": matched,
            "nearest_miss": "",
        }
