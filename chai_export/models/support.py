"""Which models the op can express, decided from the configuration alone and explained by layer."""

from __future__ import annotations

from typing import Any

from chai_export.errors import ChaiError
from chai_export.models.families import Attention, covered_families, family_of
from chai_export.models.sliding import SLIDING, layer_kinds

# Attention layer kinds that are causal attention over a key cache, of all positions or the last so many.
_CAUSAL_LAYERS = frozenset({"full_attention", SLIDING})
# What a layer may have of its own: nothing here reads it.
_MAY_DIFFER = frozenset({"intermediate_size", "moe_intermediate_size"})


def unsupported_reasons(config: Any) -> list[str]:
    """Everything about this model that CHAI's op cannot express, one sentence each; empty when it can.

    A reason that concerns single layers starts with them: "layers 0-5: …".
    """
    whole = _not_a_decoder(config) or _differing_layers(config)
    if whole:
        return whole
    layers = _num_layers(config)
    reasons = [*_layer_kinds(config), *_scores(config, layers), *_caches(config, layers)]
    reasons += _weights(config)
    # An unusual layer is the root cause; that the class has no attention interface is only its symptom.
    return reasons or _no_interface(config)


def require_supported(config: Any) -> None:
    """Raise unless :func:`unsupported_reasons` is empty.

    Raises:
        ChaiError: names the family, every layer concerned and the reason.
    """
    reasons = unsupported_reasons(config)
    if reasons:
        family = getattr(config, "model_type", "unknown")
        supported = ", ".join(each.model_type for each in covered_families())
        raise ChaiError(
            f"this {family} model cannot be compiled: {'; '.join(reasons)}; "
            f"choose a decoder of a supported family ({supported})"
        )


def _num_layers(config: Any) -> int:
    value = getattr(config, "num_hidden_layers", 0)
    return value if isinstance(value, int) else 0


def _not_a_decoder(config: Any) -> list[str]:
    family = getattr(config, "model_type", "unknown")
    if getattr(config, "is_encoder_decoder", False):
        return [f"{family} is an encoder-decoder, not a decoder-only language model"]
    if config.get_text_config() is not config:
        return [f"{family} is a composite model (text and other inputs); export its language model by itself"]
    if getattr(config, "add_cross_attention", False):
        return ["it has cross-attention to an encoder"]
    # GPT-NeoX inherits a flag from its encoder past that says nothing about it.
    encoder = getattr(config, "is_decoder", True) is False and not family_of(family).tested
    if encoder or (_model_class(config) is None and not getattr(config, "auto_map", None)):
        return [f"{family} is not a decoder-only language model"]
    return []


def _model_class(config: Any) -> Any | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _differing_layers(config: Any) -> list[str]:
    """Layers with sizes of their own; transformers raises when such a size is read for the whole model."""
    names = (getattr(config, "per_layer_attributes", None) or set()) - _MAY_DIFFER
    reasons = []
    for name in sorted(names):
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
        others = [index for index, value in enumerate(values) if value != values[0]]
        reasons.append(
            f"{layer_ranges(others)}: {name} is {values[others[0]]}, not {values[0]} as in layer 0"
        )
    return reasons


def _layer_kinds(config: Any) -> list[str]:
    kinds = layer_kinds(config)
    reasons = []
    for kind in dict.fromkeys(kinds):
        where = layer_ranges([index for index, each in enumerate(kinds) if each == kind])
        if kind not in _CAUSAL_LAYERS:
            reasons.append(f"{where}: '{kind}' is not causal attention over a key cache")
    return reasons


def _scores(config: Any, layers: int) -> list[str]:
    """Terms added to or applied on the attention scores."""
    everywhere = layer_ranges(list(range(layers)))
    reasons = []
    by_name = family_of(getattr(config, "model_type", "")).refused
    if by_name:
        reasons.append(f"{everywhere}: {by_name}")
    nested = getattr(config, "attn_config", None)
    nested_alibi = nested.get("alibi") if isinstance(nested, dict) else getattr(nested, "alibi", False)
    if getattr(config, "alibi", False) or nested_alibi:
        reasons.append(f"{everywhere}: ALiBi is added to the scores in a way that the op has not")
    return reasons


def _caches(config: Any, layers: int) -> list[str]:
    """Caches that are not one K and one V row per KV head."""
    rank = getattr(config, "kv_lora_rank", None)
    if not rank:
        return []
    everywhere = layer_ranges(list(range(layers)))
    return [
        f"{everywhere}: keys and values of all heads are made from one latent vector (kv_lora_rank {rank}); "
        "a cache should hold that vector"
    ]


def _weights(config: Any) -> list[str]:
    """Weights that cannot be exported."""
    given = [getattr(config, name, None) for name in ("quantization_config", "quantization")]
    found = next(filter(None, given), None)
    if found is None:
        return []
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    by = "" if method is None else f" by {getattr(method, 'value', method)}"
    return [
        f"its weights are quantised{by}; use the original float checkpoint (export --weights quantises it)"
    ]


def _no_interface(config: Any) -> list[str]:
    if family_of(config.model_type).attention is not Attention.INTERFACE:
        return []
    model_class = _model_class(config)
    # transformers itself decides this way whether a class follows its attention interface.
    if model_class is None or model_class._can_set_attn_implementation():
        return []
    layers = layer_ranges(list(range(_num_layers(config))))
    return [f"{layers}: {config.model_type} computes attention outside transformers' attention interface"]


def layer_ranges(layers: list[int]) -> str:
    """Name layers in few words: [0, 1, 2, 5] becomes "layers 0-2, 5", [3] becomes "layer 3"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer {text}" if len(layers) == 1 else f"layers {text}"
