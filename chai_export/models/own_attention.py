"""Families that compute attention in their own code, outside transformers' attention interface.

Each is given another way into :data:`Attend`, for the length of one forward pass:

* GPT-J and CodeGen have a method ``_attn`` for everything from scores to attended values; it is replaced.
* Falcon calls torch's ``scaled_dot_product_attention`` in the middle of its layers; that call is caught.
  Its newer architecture repeats KV heads before they are cached, so H heads arrive here; its multi-query
  variant brings one.
* BLOOM writes ALiBi plus query·key as ``baddbmm``, and its softmax and ``bmm`` follow; the three are caught.

Query, key and value arrive as from the interface: after RoPE, KV heads not repeated for their queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chai_export.errors import ChaiError
from chai_export.models.families import Attention, family_of
from chai_export.models.scoring import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Scoring], Tensor]
"""(query [B,H,S,D], key [B,G,S,D], value [B,G,S,Dv], mask, scoring) -> attended values [B,H,S,Dv].

The mask [B,1,S,S] is None when the scores are plainly causal; else True or 0 where a query sees a key.
"""


@contextmanager
def redirected(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Let a model of such a family compute its attention with ``attend`` inside the block."""
    with _WAYS[family_of(model.config.model_type).attention](model, attend):
        yield


def visible_window(mask: Tensor) -> int | None:
    """How many positions each query sees by a mask [B, 1, S, S]: the last so many up to its own place.

    Returns:
        S where the mask is causal and nothing else; None where it is not even causal with a window.
    """
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask < -1e4)).all()):
        return None
    if mask.shape[-1] != mask.shape[-2]:
        return None
    window = int(seen[0, 0, -1].sum())
    expected = torch.ones_like(seen[:1, :1]).tril().triu(1 - window)
    return window if window and bool((seen == expected).all()) else None


@contextmanager
def _replaced_method(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "_attn")]
    try:
        for module in modules:
            module._attn = partial(_as_method, attend, float(module.scale_attn))
        yield
    finally:
        for module in modules:
            module.__dict__.pop("_attn", None)  # the class's own method is visible again


def _as_method(
    attend: Attend,
    divisor: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, None]:
    return attend(query, key, value, attention_mask, Scoring(1.0 / divisor)).to(value.dtype), None


@contextmanager
def _caught_call(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    before = model.config._attn_implementation
    try:
        model.config._attn_implementation = "sdpa"  # the branch that has the call
        with _CatchProduct(attend):
            yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def _caught_products(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    with _CatchProducts(attend, int(model.config.num_attention_heads)):
        yield


_WAYS = {
    Attention.METHOD: _replaced_method,
    Attention.CALL: _caught_call,
    Attention.PRODUCTS: _caught_products,
}


class _CatchProducts(TorchFunctionMode):
    """Attention of [B·H, S, D] as three calls, of which the last gives what ``attend`` computes."""

    def __init__(self, attend: Attend, heads: int) -> None:
        super().__init__()
        self._attend = attend
        self._heads = heads
        self._products: tuple[Tensor, Tensor, Scoring] | None = None
        self._scores: Tensor | None = None
        self._mask: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.bmm and self._products is not None:
            return self._attended(*args)
        result = func(*args, **options)
        if func is torch.Tensor.baddbmm:
            self._keep(args[0], **options)
            self._scores = result
        elif func is torch.nn.functional.softmax and self._scores is not None:
            self._mask = args[0] - self._scores.view(args[0].shape)
        return result

    def _keep(self, bias: Tensor, batch1: Tensor, batch2: Tensor, beta: float, alpha: float) -> None:
        query, key = (self._by_head(rows) for rows in (batch1, batch2.transpose(1, 2)))
        self._products = query, key, Scoring(float(alpha), slopes=self._slopes(bias * beta))

    def _slopes(self, bias: Tensor) -> Tensor:
        """[H] of ALiBi [B·H, 1, S] of rows without padding.

        Raises:
            ChaiError: its steps from key to key are not even.
        """
        by_head = bias[: self._heads, 0].float()
        slopes = by_head[:, 1] - by_head[:, 0] if by_head.shape[1] > 1 else torch.zeros_like(by_head[:, 0])
        places = torch.arange(by_head.shape[1], device=bias.device)
        if not torch.allclose(by_head, by_head[:, :1] + slopes[:, None] * places, rtol=1e-5):
            raise ChaiError("its ALiBi does not grow evenly from key to key, which the op cannot express")
        return slopes

    def _attended(self, probabilities: Tensor, value: Tensor) -> Tensor:
        del probabilities
        assert self._products is not None
        (query, key, scoring), mask = self._products, self._mask
        self._products = self._scores = self._mask = None
        attended = self._attend(query, key, self._by_head(value), mask, scoring)
        return attended.to(value.dtype).flatten(0, 1)

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self._heads, *rows.shape[1:])


class _CatchProduct(TorchFunctionMode):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **options)
        return self._product(*args, **options)

    def _product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """The arguments of torch's function, as far as an evaluated decoder gives them."""
        del dropout_p, is_causal  # zero outside training; without a mask the pass is causal
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return self._attend(query, key, value, attn_mask, Scoring(factor)).to(query.dtype)
