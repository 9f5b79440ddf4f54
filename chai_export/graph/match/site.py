"""What a matcher hands back: a typed attention site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import onnx_ir as ir

from chai_export.graph.match.form import Form
from chai_export.op.heads import HeadCounts


class RightPadding(Enum):
    """Where a source takes rows that are padded on the right."""

    ANYWHERE = "anywhere"
    FRESH = "before anything is cached"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class ScoreChain:
    """The arithmetic between Q·K and the probabilities, as a function of the scores.

    ``scores`` is the product of query and key, ``logits`` what enters the softmax: everything that happens
    between them (scale, mask, casts) is evaluated numerically, not trusted. For an ``Attention`` node there
    are no such values; ``mask`` is its mask input instead, and ``scores`` and ``logits`` are None. ``sinks``
    are what takes part in the softmax beside the logits: [H], or [B,H,S,1] behind them.
    """

    scores: ir.Value | None = None
    logits: ir.Value | None = None
    mask: ir.Value | None = None
    causal: bool = False
    sinks: ir.Value | None = None


@dataclass(frozen=True)
class CachedHeads:
    """K or V as attention reads it, traced back to the cache.

    ``past`` [B,G,P,D] is a graph input, ``new`` [B,G,S,D] what is appended, ``present`` [B,G,P+S,D] both.
    ``scale`` is the product of constants multiplied in after the cache. A ``fixed`` cache has one size
    throughout, present like past [B,G,C,D], and the new rows are written into it.
    """

    past: ir.Value
    new: ir.Value
    present: ir.Value
    scale: float = 1.0
    fixed: bool = False


@dataclass(frozen=True)
class ScoreTerms:
    """What becomes of scores besides their scale, as the op has it.

    ``window`` and ``softcap`` are its attributes, 0 for none; ``sinks`` and ``slopes`` (ALiBi's) its inputs
    [H], None for none.
    """

    window: int = 0
    softcap: float = 0.0
    sinks: tuple[float, ...] | None = None
    slopes: tuple[float, ...] | None = None

    def describe(self) -> str:
        """ ", window 16, soft cap 50, sinks": what there is."""
        said = [("window", self.window), ("soft cap", self.softcap)]
        numbers = "".join(f", {name} {value:g}" for name, value in said if value)
        named = [("sinks", self.sinks), ("ALiBi", self.slopes)]
        return numbers + "".join(f", {name}" for name, value in named if value is not None)


@dataclass(frozen=True)
class AttentionSite:
    """One attention, with everything that is needed to replace it.

    ``query`` [B,H,S,D] is after RoPE and before any scale; ``output`` is [B,H,S,Dv]. ``scale`` multiplies
    the raw product of query and (unscaled) key. ``form`` is the way in which the exporter wrote it.
    ``terms`` are what the scores have besides the scale. ``chunks`` says whether the source takes several
    new tokens after a past at all. ``source_layer`` is the earlier layer whose keys, values and cache it
    reads, None if they are its own.
    """

    form: Form
    anchor: ir.Node
    query: ir.Value
    key: CachedHeads
    value: CachedHeads
    output: ir.Value
    chain: ScoreChain
    scale: float
    heads: HeadCounts
    terms: ScoreTerms = ScoreTerms()
    chunks: bool = True
    right_padding: RightPadding = RightPadding.ANYWHERE
    layer: int = -1
    source_layer: int | None = None
    nodes: tuple[ir.Node, ...] = field(default=(), compare=False)


def with_cache(sites: Iterable[AttentionSite]) -> list[AttentionSite]:
    """The sites that append to a cache of their own."""
    return [site for site in sites if site.source_layer is None]


def kv_sources(sites: Iterable[AttentionSite]) -> list[int] | None:
    """The layer whose cache each site reads; None if each has its own."""
    sources = [site.layer if site.source_layer is None else site.source_layer for site in sites]
    return None if sources == list(range(len(sources))) else sources
