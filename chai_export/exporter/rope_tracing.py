"""Rotary embeddings of transformers while a model is traced.

LongRoPE needs nothing: the choice between its two sets of factors is part of the traced graph, and the
rewrite lets every row choose for itself (:mod:`chai_export.graph.rewrite.rope_switch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def traceable_rope(model: nn.Module) -> Iterator[None]:
    """Trace rotary embeddings without control flow that depends on data; afterwards the model is as it was.

    dynamic    rotates with the factors of the trained context, where the bundle's positions end
               (:attr:`chai_export.models.rope.Rope.last_length`).
    PhiMoE     chooses the magnitude of LongRoPE with ``if``; here it is a ``where``, which can be traced.
    """
    with ExitStack() as undo:
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            if _has(kinds, "dynamic"):
                undo.callback(setattr, module, "rope_type", kinds)
                module.rope_type = _without_dynamic(kinds)
                for name, original in _original_factors(module):
                    undo.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, original)
            elif type(module).__name__ == "PhimoeRotaryEmbedding" and kinds == "longrope":
                undo.callback(delattr, module, "forward")
                module.forward = _phimoe_forward(module)
        yield


def _has(kinds: Any, kind: str) -> bool:
    each = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(one, str) and kind in one for one in each)


def _without_dynamic(kinds: Any) -> Any:
    if isinstance(kinds, dict):
        return {layer: "default" if "dynamic" in kind else kind for layer, kind in kinds.items()}
    return "default"


def _original_factors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that longer calls have changed, by name, with what was in them first."""
    buffers = module.named_buffers(remove_duplicate=False)
    names = [name for name, _ in buffers if name.endswith("original_inv_freq")]
    return [(name.replace("original_", ""), getattr(module, name)) for name in names]


def _phimoe_forward(module: Any) -> Any:
    parameters = module.config.rope_parameters

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        longer = torch.max(position_ids) + 1 > parameters["original_max_position_embeddings"]
        magnitude = torch.where(longer, parameters["long_mscale"], parameters["short_mscale"])
        factors, _ = module.rope_init_fn(module.config)
        angles = position_ids[..., None].float() * factors.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * magnitude).to(x.dtype), (angles.sin() * magnitude).to(x.dtype)

    return forward
