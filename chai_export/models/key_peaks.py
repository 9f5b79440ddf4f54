"""The largest keys of a model, channel by channel: what keys in 4 bits are equalised by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chai_export.models.attention import attention_of, causal_attention
from chai_export.models.kv_sources import describe_model
from chai_export.models.scoring import Scoring
from chai_export.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def key_peaks(model: PreTrainedModel, windows: NDArray[np.int32]) -> NDArray[np.float32]:
    """Largest magnitude of each channel of the keys, after rotary embedding.

    Args:
        model: a supported decoder.
        windows: int32 [N, T], sequences.

    Returns:
        float32 [L, G, D]; a layer that reads another layer's cache has that one's.

    Raises:
        ChaiError: the attention of a layer cannot be reached.
    """
    geometry = describe_model(model)
    peaks = np.zeros((geometry.num_layers, geometry.num_kv_heads, geometry.head_dim), np.float32)

    def layer(index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        largest = key[0].abs().amax(dim=1).float().cpu().numpy()
        np.maximum(peaks[index], largest, out=peaks[index])
        group = query.shape[1] // key.shape[1]
        return causal_attention(
            query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1), scoring
        )

    for window in track(windows, "measuring keys", total=len(windows)):
        with attention_of(model, layer), torch.inference_mode():
            model.base_model(
                input_ids=torch.from_numpy(window[None]).long().to(model.device), use_cache=False
            )
    return peaks
