"""Exports and bundles of tiny models, made once per test run and shared by every test that asks."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.exporter.stage import export
from chai_export.exporter.torch_export import DECODER_FILE, DEFAULT_OPSET, export_onnx
from chai_export.graph.stage import rewrite
from chai_export.models.geometry import describe
from tests.helpers.families import MIXED, family_config, family_model


@lru_cache
def scratch() -> Path:
    """A directory for this process, removed when it ends."""
    path = Path(tempfile.mkdtemp(prefix="chai-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process of the test run that asks for it makes; the others wait for it."""
    path = Path(os.environ["CHAI_TESTS_SHARED"]) / name
    with path.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(path)
    return path


def layers(name: str) -> dict[str, Any]:
    """Tracing costs seconds per layer: two layers where their order or kind is at stake, one elsewhere."""
    if name in ("llama-gqa", "gpt2", "opt", "smollm3-gqa") or name in MIXED:
        return {}
    return {"num_hidden_layers": 1}


@lru_cache
def model_of(name: str) -> PreTrainedModel:
    """The tiny model that :func:`exported` exports."""
    model = family_model(name, **layers(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that are all ones or zeros hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def exported(name: str, opset: int = DEFAULT_OPSET, attention: str = "sdpa") -> Path:
    """decoder.onnx of a tiny model."""
    return _exported(name, opset, attention)


@lru_cache
def _exported(name: str, opset: int, attention: str) -> Path:
    def make(directory: Path) -> None:
        export_onnx(model_of(name), directory, opset=opset, attention=attention)

    return made_once(f"{name}-{opset}-{attention}", make) / DECODER_FILE


@lru_cache
def kept_of(name: str) -> tuple[int, ...]:
    """Kept heads of the tiny bundles: another number in each layer, at least one head dropped."""
    geometry = describe(family_config(name, **layers(name)))
    return tuple(max(1, geometry.num_kv_heads // 2 - layer) for layer in range(geometry.num_layers))


def bundle_of(name: str, opset: int = DEFAULT_OPSET, attention: str = "sdpa") -> Bundle:
    """The bundle that the rewrite makes of :func:`exported`."""
    return _bundle_of(name, opset, attention)


@lru_cache
def _bundle_of(name: str, opset: int, attention: str) -> Bundle:
    path = exported(name, opset, attention)

    def make(directory: Path) -> None:
        rewrite(path, Clusters(kept_of(name)), directory / "bundle")

    return Bundle.load(made_once(f"{path.parent.name}-rewritten", make) / "bundle")


def bundle_in(name: str, dtype: str, place: Path, **options: Any) -> Bundle:
    """A tiny model below ``place`` as `export --dtype` makes a bundle of it."""
    model_of(name).save_pretrained(place / "model")
    return export(place / "model", Clusters(kept_of(name)), place / "bundle", dtype=dtype, **options)
