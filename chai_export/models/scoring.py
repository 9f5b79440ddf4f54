"""What a layer makes of query·key on the way to probabilities, in torch.

The rule is that of docs/op.md, "What happens to a row", written here once more for the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scoring:
    """The attributes and optional inputs of the op that concern scores.

    Attributes:
        scale: factor on query·key.
        window: each token sees the last ``window`` positions, itself included; 0: all.
        softcap: c; a score s becomes c·tanh(s/c); 0: none.
        sinks: [H], a logit in the denominator of each softmax of a query head; None: none.
        slopes: float32 [H], slope·(key position − query position) is added to scores; None: none.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scores are only scaled."""
        return not self.window and not self.softcap and self.sinks is None and self.slopes is None

    def first_visible(self, position: int) -> int:
        """The first position that a token at ``position`` sees."""
        return max(0, position - self.window + 1) if self.window else 0

    def scores(self, products: Tensor) -> Tensor:
        """Query·key scaled and capped, float32."""
        scores = products.float() * self.scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def probabilities(
        self, products: Tensor, first_query: int, first_key: int = 0, unseen: Tensor | None = None
    ) -> Tensor:
        """Causal softmax of query·key.

        Args:
            products: [..., H, S, T], of queries at the positions from ``first_query`` on with keys at those
                from ``first_key`` on; each query sees one of them.
            first_query: position of the first query.
            first_key: position of the first key.
            unseen: bool [..., H or 1, S, T], keys that a query does not see besides those that come later.

        Returns:
            float32 [..., H, S, T].
        """
        rows, columns = products.shape[-2:]
        device = products.device
        query = torch.arange(first_query, first_query + rows, device=device)[:, None]
        key = torch.arange(first_key, first_key + columns, device=device)[None, :]
        scores = self.scores(products)
        if self.slopes is not None:
            scores = scores + self.slopes.float()[:, None, None] * (key - query)
        hidden = key > query
        if self.window:
            hidden = hidden | (key <= query - self.window)
        if unseen is not None:
            hidden = hidden | unseen
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        sinks = self.sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
