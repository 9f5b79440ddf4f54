"""What a matcher hands back where it found no attention that can be rewritten: how far it came, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

from chai_export.graph.match.site import ScoreChain

DYNAMIC = (
    "export it again with free sizes: `optimum-cli export onnx` without --no-dynamic-axes, torch.onnx.export "
    "with dynamic_shapes, or `chai-export export MODEL`"
)
"""What helps where a graph was exported for calls of one size."""


class Reached(Enum):
    """What was looked at when a match failed, in the order in which a matcher looks; in words."""

    OPERATOR = "the operator itself"
    SCORES = "the scores"
    OPERANDS = "query and key"
    CACHE = "the cache"
    RETURN = "how the caches come back"
    MASK = "the mask"

    @property
    def depth(self) -> int:
        """How many of these held, so that the nearest miss can be told from the others."""
        return list(Reached).index(self)


class NoMatch(Exception):  # noqa: N818
    """Raised inside a matcher; carries the node that does not fit, the reason, and how far the match came.

    ``chain`` is what happens to the scores, if that was found: it may hold a better reason. ``advice`` is
    what helps, where that is more than another model.
    """

    def __init__(
        self,
        node: ir.Node | None,
        reason: str,
        reached: Reached = Reached.OPERATOR,
        chain: ScoreChain | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason
        self.reached = reached
        self.chain = chain
        self.advice = advice


@dataclass(frozen=True)
class Refusal:
    """An anchor that looks like attention and cannot be rewritten."""

    anchor: ir.Node
    node: ir.Node | None
    reason: str
    reached: Reached
    layer: int | None = None
    chain: ScoreChain | None = None
    advice: str | None = None

    def where(self) -> str:
        """The layer (or anchor) and the node, for messages."""
        place = f"layer {self.layer}" if self.layer is not None else f"attention at {self.anchor.name!r}"
        node = self.node
        return place if node is None else f"{place}, node {node.name!r} ({node.op_type})"
