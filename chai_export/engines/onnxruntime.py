"""The ONNX Runtime "engine": proof that the bundle runs here, and the limits it may run to. No file.

ONNX Runtime could write its optimised graph, and starting from it would save a second or so. It is left out
on purpose: written with the native library registered it lacks the function body, written without it the
body is inlined and the library's kernel is never used again. Either way the bundle would be tied to whether
one file is present, for little. The record holds no library either, so the same bundle runs with and
without it.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from chai_export.bundle.bundle import MODEL_FILE, Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.bundle.manifest import EngineRecord
from chai_export.errors import ChaiError
from chai_export.runtime.session import open_session
from chai_export.version import CREATED_WITH


def build_onnxruntime(
    bundle: Bundle, max_batch: int, max_seq: int, cache_memory: int | None = None
) -> EngineRecord:
    """Load the bundle, run one step at the largest batch, and return the record of it.

    Raises:
        ChaiError: ONNX Runtime cannot run the bundle, its result is not finite, or caches of
            ``max_batch`` × ``max_seq`` tokens do not fit in memory, or one row of them in ``cache_memory``.
    """
    manifest = bundle.manifest
    session = open_session(bundle, Backend.ONNXRUNTIME, Heads.CHAI, cache_memory=cache_memory)
    rows = max_batch if cache_memory is None else 1  # the others may wait
    session.begin(rows, max_seq)
    tokens = min(manifest.probe_tokens + 1, max_seq)
    logits = session.step(
        np.zeros((rows, tokens), np.int64),
        np.full(rows, tokens, np.int32),
        np.zeros(rows, np.int32),
        np.full((rows, 1), tokens - 1, np.int64),
    )
    if not np.isfinite(logits).all():
        raise ChaiError(f"{bundle.model_path} gives logits that are not finite; export with --dtype float32")
    return EngineRecord(
        backend=Backend.ONNXRUNTIME,
        runtime_version=ort.__version__,
        model_sha256=manifest.files[MODEL_FILE].sha256,
        max_batch=max_batch,
        max_seq=max_seq,
        op_version=manifest.op_version,
        created_with=CREATED_WITH,
    )
