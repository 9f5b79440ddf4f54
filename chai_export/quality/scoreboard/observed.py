"""What methods that choose by calibration text look at: queries, keys and values of a few windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chai_export.models.attention import attention_of
from chai_export.models.scoring import Scoring
from chai_export.op.heads import DecoderHeads
from chai_export.quality.scoreboard.method import attended

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Seen:
    """One layer's attention in one window: [1, H, S, D], [1, G, S, D], [1, G, S, Dv], exact values out."""

    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring
    out: Tensor


@dataclass(frozen=True)
class Observed:
    """Calibration of a model: its heads and, by window and layer, what attention saw.

    Attributes:
        heads: of the decoder.
        layers: by window, by layer.
        similarity: by layer, mean cosine similarity of the residual stream before and after its attention;
            empty where the model's blocks cannot be read.
        rotation: cos and sin [S, D] of the rotary positions, None where keys are not rotated in halves.
    """

    heads: DecoderHeads
    layers: tuple[tuple[Seen, ...], ...]
    similarity: tuple[float, ...]
    rotation: tuple[Tensor, Tensor] | None


def observe(
    model: PreTrainedModel, heads: DecoderHeads, windows: NDArray[np.int32], longest: int
) -> Observed:
    """Run the exact model on calibration windows.

    Args:
        model: a supported decoder in float32.
        heads: of the model.
        windows: int32 [n, T].
        longest: tokens of the sequences that are measured later, for rotary factors.
    """
    seen: list[tuple[Seen, ...]] = []
    blocks = _Blocks(model)
    for window in windows:
        layers: list[Seen] = []

        def layer(
            index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, into: list[Seen] = layers
        ) -> Tensor:
            del index
            out = attended(query, key, value, scoring)
            into.append(Seen(query, key, value, scoring, out))
            return out

        with attention_of(model, layer), blocks.watched(), torch.inference_mode():
            model(input_ids=torch.from_numpy(window[None]).long(), use_cache=False)
        seen.append(tuple(layers))
    return Observed(heads, tuple(seen), blocks.similarity(), _rotation(model, longest, heads.head_dim))


class _Blocks:
    """Hooks on blocks of the common form: ``model.layers[i].self_attn``, its output added to the input."""

    def __init__(self, model: PreTrainedModel) -> None:
        layers = getattr(getattr(model, "model", None), "layers", ())
        self._blocks = [_Block(layer) for layer in layers if hasattr(layer, "self_attn")]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look on while the model runs."""
        with ExitStack() as hooks:
            for block in self._blocks:
                hooks.enter_context(block.watched())
            yield

    def similarity(self) -> tuple[float, ...]:
        """By layer, over all runs."""
        return tuple(block.total / block.runs for block in self._blocks if block.runs)


class _Block:
    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.total, self.runs = 0.0, 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        entered: list[Tensor] = []

        def before(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            del module
            entered[:] = [args[0] if args else kwargs["hidden_states"]]

        def after(module: object, args: object, out: tuple[Tensor, ...]) -> None:
            del module, args
            self.total += float(torch.cosine_similarity(entered[0], entered[0] + out[0], dim=-1).mean())
            self.runs += 1

        hooks = [
            self._layer.register_forward_pre_hook(before, with_kwargs=True),
            self._layer.self_attn.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _rotation(model: PreTrainedModel, tokens: int, dim: int) -> tuple[Tensor, Tensor] | None:
    """Rotary factors of models that have them in one module for all layers and turn whole heads in halves."""
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if rotary is None:
        return None
    with torch.inference_mode():
        cos, sin = rotary(torch.zeros(1, 1), torch.arange(tokens)[None])[:2]
    return (cos[0], sin[0]) if cos.shape[-1] == dim else None


def unrotated(rows: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Keys [1, G, S, D] as they were before rotary positions."""
    cos, sin = (factor[: rows.shape[2]] for factor in rotation)
    return rows * cos - _half_turn(rows) * sin


def rotated(rows: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Keys [1, G, S, D] turned by their positions."""
    cos, sin = (factor[: rows.shape[2]] for factor in rotation)
    return rows * cos + _half_turn(rows) * sin


def _half_turn(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
