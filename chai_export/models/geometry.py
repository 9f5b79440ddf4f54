"""The numbers of a decoder that the other stages need, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chai_export.errors import ChaiError
from chai_export.models.families import family_of
from chai_export.models.rope import rope_of
from chai_export.op.heads import DecoderHeads


@dataclass(frozen=True, kw_only=True)
class Geometry(DecoderHeads):
    """Sizes of a decoder-only model; :func:`chai_export.models.kv_sources.describe_model` fills in
    ``kv_source_layers``.

    Attributes:
        model_type: the family, as transformers names it ("llama", "opt", …).
        hidden_size: width of the residual stream.
        vocab_size: rows of the output head (V).
        max_positions: a hard limit in tokens: length of a position table, or where rotary factors that grow
            with a row begin to; None without one.
        context_length: tokens of context that the model was trained for; None when it does not say.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    context_length: int | None


def describe(config: Any) -> Geometry:
    """Geometry of a transformers configuration.

    Raises:
        ChaiError: the configuration lacks a size, or its heads do not divide evenly.
    """
    model_type = str(getattr(config, "model_type", "unknown"))
    heads = _size(config, model_type, "num_attention_heads")
    hidden = _size(config, model_type, "hidden_size")
    family = family_of(model_type)
    kv_heads = family.kv_heads(config, heads)
    if heads % kv_heads:
        raise ChaiError(
            f"config.json of this {model_type} model has {heads} query heads for {kv_heads} KV heads, "
            "which do not divide evenly; correct num_attention_heads or num_key_value_heads"
        )
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    context = getattr(config, "max_position_embeddings", None)
    table = int(context) if context and family.position_table else None
    limits = [limit for limit in (table, rope_of(config).last_length) if limit]
    return Geometry(
        model_type=model_type,
        num_layers=_size(config, model_type, "num_hidden_layers"),
        num_query_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=int(getattr(config, "v_head_dim", None) or head_dim),
        hidden_size=hidden,
        vocab_size=_size(config, model_type, "vocab_size"),
        max_positions=min(limits, default=None),
        context_length=int(context) if context else None,
    )


def _size(config: Any, model_type: str, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ChaiError(
            f"config.json of this {model_type} model has no usable {name} ({value!r}); "
            "only decoder-only models with the same heads in every layer can be compiled"
        )
    return value
