"""Building an engine inside a bundle: one entry for every backend."""

from __future__ import annotations

from pathlib import Path

from chai_export.arguments import require_at_least_one, whole
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend
from chai_export.bundle.engine_record import add_engine
from chai_export.bundle.manifest import EngineRecord
from chai_export.errors import ChaiError, UsageError

DEFAULT_MAX_SEQ = 4096
"""Tokens when neither the caller nor the model names a length."""


def build(
    bundle: str | Path | Bundle,
    backend: Backend | str = Backend.ONNXRUNTIME,
    max_batch: int = 8,
    max_seq: int | None = None,
    *,
    cache_memory: int | None = None,
    builder_memory: int | None = None,
    kernels: str | Path | None = None,
    alias_caches: bool | None = None,
    gpu: str | None = None,
) -> EngineRecord:
    """Build an engine for ``backend`` and enter it in the bundle's manifest.

    Args:
        bundle: the bundle or its path.
        backend: "onnxruntime" or "tensorrt".
        max_batch: most rows computed at one time.
        max_seq: most tokens of prompt and text together. Default: what the model was trained for.
        cache_memory: bytes that the KV caches of a run may take, so that rows wait for each other's pages.
            Default: room for ``max_batch`` rows of ``max_seq`` tokens, which must be there now.
        builder_memory: "tensorrt" only: bytes of GPU memory that the builder may use as workspace.
        kernels: "tensorrt" only: directory of kernels compiled elsewhere, instead of compiling them.
        alias_caches: "tensorrt" only: whether the builder is told that caches are appended to in place
            (preview feature ``kALIASED_PLUGIN_IO_10_03``). Default: it is.
        gpu: "onnxruntime" only: compile GPU kernels for its CUDA provider: "here" for this machine's GPU, or
            architectures such as "sm_80,sm_90", which need not be here. Default: kernels stay as they are.

    Raises:
        UsageError: the backend is unknown, a limit is below 1, or an argument is of another backend.
        ChaiError: the bundle is not valid or cannot be written, the backend cannot run it, the caches of
            these limits do not fit in memory, or the model has fewer positions.
    """
    backend = Backend(backend)
    options = (
        ("--builder-memory", builder_memory),
        ("--kernels", kernels),
        ("--alias-caches", alias_caches),
    )
    for flag, option in options:
        if option is not None and backend is not Backend.TENSORRT:
            raise UsageError(f"{flag} is for --backend tensorrt; leave it out for {backend}")
    if gpu is not None and backend is not Backend.ONNXRUNTIME:
        raise UsageError(f"--gpu is for --backend onnxruntime; leave it out for {backend}")
    whole(max_batch, "--max-batch")
    require_at_least_one(max_seq=max_seq)
    if cache_memory is not None:
        whole(cache_memory, "--cache-memory", most=2**63 - 1)
    if builder_memory is not None:
        whole(builder_memory, "--builder-memory", most=2**63 - 1)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    manifest = bundle.manifest
    if max_seq is None:
        max_seq = manifest.max_positions or manifest.context_length or DEFAULT_MAX_SEQ
    if manifest.max_positions is not None and max_seq > manifest.max_positions:
        raise ChaiError(
            f"--max-seq is {max_seq} and the model has learned {manifest.max_positions} positions; lower it"
        )
    if backend is Backend.TENSORRT:
        from chai_export.engines.tensorrt import build_tensorrt

        given = Path(kernels) if kernels is not None else None
        record = build_tensorrt(
            bundle,
            max_batch,
            max_seq,
            builder_memory=builder_memory,
            kernels=given,
            alias_caches=alias_caches is not False,
        )
    else:
        from chai_export.engines.onnxruntime import build_onnxruntime

        record = build_onnxruntime(bundle, max_batch, max_seq, cache_memory, gpu)
    record = record.model_copy(update={"cache_memory": cache_memory})
    add_engine(bundle, record)
    return record
