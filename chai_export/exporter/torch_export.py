"""A Hugging Face causal language model to ONNX with flat past and present tensors (torch.onnx, dynamo)."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.errors import ChaiError, reason
from chai_export.models.families import Attention, family_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from chai_export.graph.weights.quantise import WeightFormat

DECODER_FILE = "decoder.onnx"
OPSETS = range(18, 25)
DEFAULT_OPSET = 23
"""Attention, RotaryEmbedding and RMSNormalization are single nodes from opset 23: the smallest graph."""

# Sizes of the traced example. All differ, and none is 1, so that no two dims are taken for the same one.
_BATCH, _TOKENS, _PAST = 2, 3, 5


def export_onnx(
    model: PreTrainedModel,
    directory: Path,
    *,
    opset: int = DEFAULT_OPSET,
    attention: str = "sdpa",
    weights: WeightFormat | None = None,
    quantise_head: bool = True,
) -> Path:
    """Write ``directory/decoder.onnx`` with its weights in ``decoder.onnx.data``.

    The graph has inputs input_ids int64 [batch, tokens], attention_mask int64 [batch, past + tokens],
    position_ids int64 [batch, tokens] (if the model takes them), past_key_values.{i}.key and .value
    [batch, G, past, D]; outputs logits [batch, tokens, V], present.{i}.key and .value, i being the layers
    that have a cache. Weights are written one at a time; no second copy of them is held.

    Args:
        model: a causal language model on the CPU, in the dtype to export.
        directory: an existing directory.
        opset: 18 … 24. From 23 on attention is one ``Attention`` node.
        attention: transformers' implementation to trace, "sdpa" or "eager". Families with attention code of
            their own are traced eagerly: torch.onnx cannot express their one KV head for many queries.
        weights: what matrices are quantised to, one at a time; None leaves them floats.
        quantise_head: the head too, in 8 bits.

    Returns:
        The path of decoder.onnx.

    Raises:
        ChaiError: the opset is not supported, or the model cannot be traced.
    """
    import onnx_ir as ir

    if opset not in OPSETS:
        raise ChaiError(f"opset {opset} is not supported; use one of {OPSETS.start} to {OPSETS.stop - 1}")
    ir_model = trace(model, opset=opset, attention=attention)
    if weights is not None:
        from chai_export.exporter.block_weights import quantise_products

        quantise_products(ir_model, weights, head=quantise_head)
    path = directory / DECODER_FILE
    ir.save(ir_model, path, external_data=f"{DECODER_FILE}.data")
    return path


def trace(model: PreTrainedModel, *, opset: int, attention: str) -> ir.Model:
    """The optimised ONNX graph of ``model``; its initializers still view the torch parameters.

    Raises:
        ChaiError: the model cannot be traced.
    """
    import torch

    from chai_export.exporter.flat_cache import FlatCacheDecoder, cache_shapes, takes_position_ids
    from chai_export.exporter.rope_tracing import traceable_rope

    shapes = cache_shapes(model)
    dtype = model.dtype
    past = [
        (torch.zeros(_BATCH, kg, _PAST, kd, dtype=dtype), torch.zeros(_BATCH, vg, _PAST, vd, dtype=dtype))
        for (kg, kd), (vg, vd) in shapes.values()
    ]
    arguments: dict[str, Any] = {
        "input_ids": torch.zeros(_BATCH, _TOKENS, dtype=torch.int64),
        "attention_mask": torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64),
        "past_key_values": past,
    }
    cache_dims = {0: "batch", 2: "past"}
    dims: dict[str, Any] = {
        "input_ids": {0: "batch", 1: "tokens"},
        "attention_mask": {0: "batch", 1: "total"},
        "past_key_values": [(cache_dims, cache_dims) for _ in shapes],
    }
    caches = [f"{{}}.{i}.{part}" for i in shapes for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(name.format("past_key_values") for name in caches)]
    if takes_position_ids(model):
        positions = torch.arange(_PAST, _PAST + _TOKENS).expand(_BATCH, _TOKENS).contiguous()
        arguments["position_ids"] = positions
        dims["position_ids"] = {0: "batch", 1: "tokens"}
        names.append("position_ids")
    with _traceable(model, attention), traceable_rope(model), _quiet():
        try:
            program = torch.onnx.export(
                FlatCacheDecoder(model, list(shapes)),
                kwargs=arguments,
                dynamic_shapes=dims,
                input_names=names,
                output_names=["logits", *(name.format("present") for name in caches)],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            # torch raises many types here, and the first line of the root cause is what helps.
            raise ChaiError(
                f"torch.onnx.export cannot trace {type(model).__name__} at opset {opset} "
                f"({reason(_root(error))}); try another opset or another model"
            ) from error
    if program is None:
        raise ChaiError(f"torch.onnx.export returned nothing for {type(model).__name__}; update torch")
    return _optimised(program.model)


def _optimised(model: ir.Model) -> ir.Model:
    """Fold constants and fuse as torch.onnx does by itself, but leave weights where they are."""
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    from chai_export.exporter.exact_scalars import exact_scalars
    from chai_export.exporter.lazy_transpose import fold_weight_transposes
    from chai_export.exporter.norm_types import align_norm_types
    from chai_export.exporter.rotary_casts import rotary_casts

    def is_small(node: ir.Node) -> bool | None:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is not None and source.is_initializer() and len(source.shape or ()) == 2:
            return False  # a parameter, which keeps its name
        tensors = [value.const_value for value in node.inputs if value is not None]
        return False if any(t is not None and t.size > _LARGEST_FOLDED for t in tensors) else None

    with exact_scalars(model):
        optimizer.optimize_ir(model, should_fold=is_small)
    with rotary_casts(model):
        onnx_fusions.fuse(model)
    align_norm_types(model)
    fold_weight_transposes(model)
    return model


_LARGEST_FOLDED = 8192


@contextmanager
def _traceable(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Trace with the given attention, and experts without data-dependent control; then restore the model."""
    before = model.config._attn_implementation
    experts = getattr(model.config, "_experts_implementation", None)
    own = family_of(model.config.model_type).attention is not Attention.INTERFACE
    if own:  # there is nothing to set but what their code reads
        model.config._attn_implementation = "eager"
    else:
        try:
            model.set_attn_implementation(attention)
        except ValueError:
            # Some families have eager attention only.
            model.set_attn_implementation("eager")
    if experts is not None:
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        if own:
            model.config._attn_implementation = before
        else:
            model.set_attn_implementation(before)
        if experts is not None:
            model.set_experts_implementation(experts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.onnx: it warns of optional packages and internals, and prints graphs that fail."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
