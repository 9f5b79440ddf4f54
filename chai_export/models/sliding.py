"""Sliding windows: which layers have one, and plain causal masks where no position can reach past it.

A window at least as long as the context hides nothing. Its configuration is left as it is, since a family may
say more with the kinds of its layers (Cohere 2 rotates in sliding layers only, Gemma 3 with other
frequencies, Gemma 4 has other heads in them); only the mask is made without the window.
"""

from __future__ import annotations

from typing import Any

SLIDING = "sliding_attention"
TRACED = "chai_traced"
"""transformers' sdpa attention with :func:`causal_mask`; see :func:`register_traced`."""


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer, as transformers names them; empty where all are plain and none is named."""
    kinds = list(getattr(config, "layer_types", None) or [])
    if not kinds and getattr(config, "sliding_window", None):
        # Families without a list of kinds apply their window everywhere, unless a switch turns it off.
        layers = getattr(config, "num_hidden_layers", 0)
        kinds = [SLIDING] * layers if getattr(config, "use_sliding_window", True) else []
    return kinds


def window_of(config: Any) -> int | None:
    """Tokens that a sliding layer sees, its own included; None if no layer slides."""
    window = getattr(config, "sliding_window", None)
    return int(window) if window and SLIDING in layer_kinds(config) else None


def is_idle(config: Any, window: int | None) -> bool:
    """Whether a window hides nothing within the context."""
    context = getattr(config, "max_position_embeddings", None)
    return bool(window and context and window >= context)


def causal_mask(*, config: Any, mask_function: Any, local_size: int | None = None, **rest: Any) -> Any:
    """transformers' mask for sdpa, without windows that hide nothing.

    Called by transformers with the arguments of its ``sdpa_mask``; ``use_vmap`` tells that the model has put
    something of its own into ``mask_function``, which then stays.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if is_idle(config, local_size) and not rest.get("use_vmap"):
        mask_function, local_size = causal_mask_function, None
    return sdpa_mask(config=config, mask_function=mask_function, local_size=local_size, **rest)


def register_traced() -> str:
    """Make :data:`TRACED` known to transformers; returns it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if TRACED not in AttentionInterface._global_mapping:
        AttentionInterface.register(TRACED, sdpa_attention_forward)
        AttentionMaskInterface.register(TRACED, causal_mask)
    return TRACED
