"""``chai-export bench generate``: time to the first token and per token after it, of whole models.

All implementations hold their caches at the same time and take turns token by token, so that a slow phase
of the machine hits each of them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil

from chai_export.arguments import require_at_least_one
from chai_export.bench import machine
from chai_export.bench.cache_facts import cache_facts, is_quantised
from chai_export.bench.decoders import BundleDecoder, Decoder, GenaiDecoder, build_genai, genai_is_installed
from chai_export.bench.timing import Timing, interleaved
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.manifest import Manifest
from chai_export.errors import ChaiError, UsageError

ALL_HEADS = "chai_all_heads"
GENAI = "onnxruntime_genai"
GENAI_INT8 = "onnxruntime_genai_int8"
AGAINST = "against_all_heads"


def bench_generate(
    bundle: str | Path,
    *,
    prompt_tokens: int = 1024,
    new_tokens: int = 32,
    rounds: int = 3,
    model: str | Path | None = None,
    against: str | Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure a bundle with CHAI and with all heads, and onnxruntime-genai on the same weights.

    Where the bundle has a quantised cache, onnxruntime-genai is measured with its int8 cache too.

    Args:
        bundle: what to measure.
        prompt_tokens: length of the prompt, of random tokens.
        new_tokens: tokens after the first one that are timed.
        rounds: prompts that are timed, for the time to the first token.
        model: the Hugging Face directory that the bundle was made of, for onnxruntime-genai.
        against: another bundle of the model, such as one with an exact cache, to measure with all heads.
        threads: of every implementation; all cores that this process may use by default.

    Raises:
        UsageError: a length, the rounds or the threads are out of range.
        ChaiError: the bundle is not valid, or its caches do not fit in memory.
    """
    require_at_least_one(prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, threads=threads)
    loaded = Bundle.load(bundle)
    manifest = loaded.manifest
    capacity = prompt_tokens + new_tokens + 1
    if manifest.max_positions is not None and capacity > manifest.max_positions:
        raise UsageError(
            f"{capacity} tokens are asked for, the model has {manifest.max_positions}; lower --prompt-tokens"
        )
    cores = threads or len(os.sched_getaffinity(0))
    other = Bundle.load(against) if against is not None else None
    _require_memory(manifest, other, capacity)
    with tempfile.TemporaryDirectory(prefix="chai-genai-") as work:
        decoders: dict[str, Decoder] = {
            "chai": BundleDecoder(loaded, "chai", capacity, cores),
            ALL_HEADS: BundleDecoder(loaded, "all", capacity, cores),
        }
        if other is not None:
            decoders[AGAINST] = BundleDecoder(other, "all", capacity, cores)
        skipped = _add_genai(decoders, model, Path(work), manifest, capacity, cores)
        prompt = np.random.default_rng(0).integers(0, manifest.vocab_size, prompt_tokens)
        first, each = _measure(decoders, prompt, new_tokens, rounds)
    ceiling = decode_ceiling(loaded, prompt_tokens + new_tokens // 2)
    return {
        "machine": machine.describe(),
        "threads": cores,
        "bundle": str(bundle),
        "against": str(against) if against is not None else None,
        "dtype": manifest.dtype,
        "kept_heads": list(manifest.kept_heads),
        **cache_facts(manifest),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ttft_ms": {name: timing.median for name, timing in first.items()},
        "tpot_ms": {name: timing.median for name, timing in each.items()},
        "ttft_spread": {name: timing.spread for name, timing in first.items()},
        "tpot_spread": {name: timing.spread for name, timing in each.items()},
        "skipped": skipped,
        "ceiling": ceiling,
        "ttft_speedup_vs_best_peer": _speedup(first),
        "tpot_speedup_vs_best_peer": _speedup(each),
    }


def decode_ceiling(bundle: Bundle, tokens: int) -> float:
    """What decoding can gain with ``tokens`` in the cache: bytes read per token, all heads against CHAI."""
    weights = weight_bytes(bundle.model_path)
    all_heads, chai = (
        weights + tokens * bundle.manifest.kv_bytes_per_token(mode) for mode in ("all", "chai")
    )
    return all_heads / chai


def weight_bytes(path: Path) -> int:
    """Bytes of weights read for one token: every initializer but tables that rows are gathered from."""
    graph = onnx.load(path, load_external_data=False).graph
    used_by: dict[str, set[str]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            used_by.setdefault(name, set()).add("table" if node.op_type == "Gather" and position == 0 else "")
    total = 0
    for tensor in graph.initializer:
        if used_by.get(tensor.name) != {"table"}:
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            total += int(np.prod(tensor.dims, dtype=np.int64)) * itemsize
    return total


def _require_memory(manifest: Manifest, other: Bundle | None, capacity: int) -> None:
    per_token = manifest.kv_bytes_per_token("chai") + 2 * manifest.kv_bytes_per_token("all")
    if other is not None:
        per_token += other.manifest.kv_bytes_per_token("all")
    caches = capacity * per_token
    available = psutil.virtual_memory().available
    if caches > available:
        raise ChaiError(
            f"the caches of all implementations take {caches / 1e9:.1f} GB and {available / 1e9:.1f} GB are "
            "free; lower --prompt-tokens"
        )


def _add_genai(
    decoders: dict[str, Decoder],
    model: str | Path | None,
    work: Path,
    manifest: Manifest,
    capacity: int,
    threads: int,
) -> dict[str, str]:
    """Add onnxruntime-genai, or say why it is not there."""
    names = [GENAI, GENAI_INT8] if is_quantised(manifest) else [GENAI]
    if not genai_is_installed():
        return dict.fromkeys(names, "not installed; pip install onnxruntime-genai")
    if model is None:
        return dict.fromkeys(names, "--model is not given")
    for name in names:
        int8_cache = manifest.head_counts if name == GENAI_INT8 else None
        build_genai(Path(model), work / name, manifest.dtype, threads, int8_cache)
        decoders[name] = GenaiDecoder(work / name, capacity)
    return {}


def _measure(
    decoders: Mapping[str, Decoder], prompt: Any, new_tokens: int, rounds: int
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times to the first token and per token after it, by implementation."""
    for decoder in decoders.values():
        decoder.first(prompt[: min(len(prompt), 64)])  # memory is touched
    first = {name: partial(decoder.first, prompt) for name, decoder in decoders.items()}
    each = {name: decoder.next for name, decoder in decoders.items()}
    return _rounds(first, rounds, "prompts"), _rounds(each, new_tokens, "tokens")


def _rounds(calls: Mapping[str, Callable[[], object]], count: int, what: str) -> dict[str, Timing]:
    progress = f"bench generate: {what}"
    return interleaved(calls, min_rounds=count, max_rounds=count, warm_up=False, progress=progress)


def _speedup(timings: Mapping[str, Timing]) -> float:
    return min(timing.median for name, timing in timings.items() if name != "chai") / timings["chai"].median
