"""Exports with sizes that torch was told to take as they are."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path

import torch

from chai_export.exporter.flat_cache import FlatCacheDecoder, cache_shapes
from tests.helpers.exported import model_of, scratch

NAME = "llama-gqa"


@lru_cache
def exported_with(dynamic: tuple[str, ...], tokens: int, past: int, opset: int = 23) -> Path:
    """The tiny Llama with batch 1 and only the dims named in ``dynamic`` ("tokens", "past") free."""
    model = model_of(NAME)
    shapes = cache_shapes(model)
    caches = [
        (torch.zeros(1, kg, past, kd), torch.zeros(1, vg, past, vd)) for (kg, kd), (vg, vd) in shapes.values()
    ]
    free_tokens, free_past = "tokens" in dynamic, "past" in dynamic
    total = {1: "total"} if free_tokens or free_past else None
    per_cache = {2: "past"} if free_past else None
    names = [f"{{}}.{i}.{part}" for i in shapes for part in ("key", "value")]
    path = scratch() / f"static-{'-'.join(dynamic)}-{tokens}-{past}-{opset}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            FlatCacheDecoder(model, list(shapes)),
            kwargs={
                "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
                "attention_mask": torch.ones(1, past + tokens, dtype=torch.int64),
                "past_key_values": caches,
                "position_ids": torch.arange(past, past + tokens)[None],
            },
            f=path,
            dynamic_shapes={
                "input_ids": {1: "tokens"} if free_tokens else None,
                "attention_mask": total,
                "past_key_values": [(per_cache, per_cache) for _ in shapes],
                "position_ids": {1: "tokens"} if free_tokens else None,
            },
            input_names=[
                "input_ids",
                "attention_mask",
                *(name.format("past_key_values") for name in names),
                "position_ids",
            ],
            output_names=["logits", *(name.format("present") for name in names)],
            opset_version=opset,
            dynamo=True,
            verbose=False,
            external_data=False,
        )
    return path
