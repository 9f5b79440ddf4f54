"""Numbers of heads and their widths, of one attention and of a decoder, and the cache elements they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chai_export.op.kv_sharing import owners


@dataclass(frozen=True)
class HeadCounts:
    """The heads of one attention.

    Attributes:
        num_query_heads: query heads (H), a multiple of G.
        num_kv_heads: KV heads (G).
        head_dim: width of a query or key head (D).
        value_head_dim: width of a value head (Dv).

    Raises:
        ValueError: H is no multiple of G.
    """

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int

    def __post_init__(self) -> None:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads {self.num_query_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )

    @property
    def group(self) -> int:
        """Query heads that share one KV head (H / G)."""
        return self.num_query_heads // self.num_kv_heads

    def cache_elements(self, kept: int) -> int:
        """Elements of K and V that a token takes in a cache with ``kept`` KV heads in K: R·D + G·Dv."""
        return kept * self.head_dim + self.num_kv_heads * self.value_head_dim


@dataclass(frozen=True, kw_only=True)
class DecoderHeads(HeadCounts):
    """The heads of a decoder whose layers are alike, and which layers have caches.

    Attributes:
        num_layers: attention layers (L).
        kv_source_layers: the layer whose K and V each layer reads, itself or an earlier one; None when each
            has its own (:mod:`chai_export.op.kv_sharing`).
    """

    num_layers: int
    kv_source_layers: Sequence[int] | None = None

    @property
    def cache_layers(self) -> list[int]:
        """The layers that have a cache: all but those that read an earlier layer's."""
        return owners(self.kv_source_layers, self.num_layers)

    @property
    def all_kept(self) -> list[int]:
        """Kept KV heads by layer when every one is kept."""
        return [self.num_kv_heads] * self.num_layers

    def kv_elements_per_token(self, kept_heads: Sequence[int]) -> int:
        """Elements of K and V that one token of one row takes over all layers, shared caches once.

        ``kept_heads[i]`` KV heads are in the K cache of layer i.
        """
        return sum(self.cache_elements(kept_heads[layer]) for layer in self.cache_layers)

    def kv_bytes_saved(self, kept_heads: Sequence[int]) -> float:
        """Share of the KV cache that disappears when layer i keeps ``kept_heads[i]`` heads in its K cache."""
        whole = self.kv_elements_per_token(self.all_kept)
        return (whole - self.kv_elements_per_token(kept_heads)) / whole
