"""What the rewrite sees in a graph, as a table: one row per attention; and what the rewrite would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chai_export.graph.explain.describe import describe_parts
from chai_export.graph.explain.estimate import Estimate
from chai_export.graph.match.find import Survey
from chai_export.graph.match.form import Form
from chai_export.graph.match.miss import Refusal
from chai_export.graph.match.site import AttentionSite
from chai_export.op.schema import DOMAIN, OP_TYPE

_COLUMNS = ("layer", "form", "heads", "R")
_MATCHED = ("matched",)
_MISSED = ("matched up to", "stopped by")


@dataclass(frozen=True)
class Explanation:
    """The result of ``rewrite --explain``.

    ``problem`` is what stands in the way of the whole graph (None if nothing does); ``kept_heads`` the R of
    each layer when clusters were given; ``needs`` what the rewrite would take.
    """

    path: str
    survey: Survey
    ops: dict[str, int]
    needs: Estimate
    problem: str | None = None
    kept_heads: Sequence[int] | None = None

    @property
    def columns(self) -> list[str]:
        """Heads of the table: what matched, and if something did not, how far it got and what stopped it."""
        survey = self.survey
        return [*_COLUMNS, *(_MATCHED if survey.sites else ()), *(_MISSED if survey.refusals else ())]

    @property
    def rewritable(self) -> bool:
        """Whether every attention matched and nothing else is in the way."""
        return self.problem is None and bool(self.survey.sites) and not self.survey.refusals

    @property
    def forms(self) -> dict[str, str]:
        """The forms that occur, letter and description."""
        found = {site.form for site in self.survey.sites}
        return {form.value: form.description for form in Form if form in found}

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
            advice = f"; {worst.advice}" if worst.advice else ""
            return f"cannot be rewritten: {worst.where()}: {worst.reason}{advice}"
        return f"can be rewritten: {len(self.survey.sites)} attentions"

    def rows(self) -> list[tuple[str, ...]]:
        """One row per attention, as text, in the order of :attr:`columns`."""
        columns = self.columns
        return [tuple(str(row[name.replace(" ", "_")]) for name in columns) for row in self._rows()]

    def to_json(self) -> dict[str, Any]:
        """JSON object of ``inspect --json`` for an ONNX file."""
        return {
            "kind": "onnx",
            "path": self.path,
            "rewritable": self.rewritable,
            "verdict": self.verdict,
            "num_layers": len(self.survey.findings),
            "attentions": self._rows(),
            "forms": self.forms,
            "ops": self.ops,
            "estimate": self.needs.to_json(),
        }

    def _rows(self) -> list[dict[str, Any]]:
        return [self._row(index, finding) for index, finding in enumerate(self.survey.findings)]

    def _row(self, index: int, finding: AttentionSite | Refusal) -> dict[str, Any]:
        kept = self.kept_heads[index] if self.kept_heads and index < len(self.kept_heads) else ""
        row: dict[str, Any] = {
            "layer": index,
            "form": "",
            "heads": "",
            "R": kept,
            "matched": "",
            "parts": None,
        }
        if isinstance(finding, Refusal):
            node = finding.node or finding.anchor
            reached = f"{finding.anchor.op_type} {finding.anchor.name!r}, {finding.reached.value}"
            miss = f"{node.op_type} {node.name!r}: {finding.reason}"
            return {**row, "matched_up_to": reached, "stopped_by": miss}
        parts = asdict(describe_parts(finding))
        counts = finding.heads
        heads = f"{counts.num_query_heads} query, {counts.num_kv_heads} KV, dim {counts.head_dim}"
        matched = (
            f"{parts['attention']}; mask {parts['mask']}; RoPE {parts['rope']}; Q/K norm {parts['norm']}; "
            f"Q/K weights {parts['weights']}; cache {parts['cache']}"
        )
        found = {"form": finding.form.value, "heads": heads, "matched": matched, "parts": parts}
        return {**row, **found, "matched_up_to": "", "stopped_by": ""}
