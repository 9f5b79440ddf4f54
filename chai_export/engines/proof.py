"""An engine against ONNX Runtime before it counts as built: a prompt, decode steps, a graph's replay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Heads
from chai_export.errors import ChaiError
from chai_export.op.dtypes import Dtype
from chai_export.progress import note
from chai_export.runtime.cache import available_memory
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.session import Session

DECODES = 4
"""A session runs the first step of a shape, captures the second, and replays it from then on."""
_ALLOWED = {Dtype.FLOAT32: 1e-2, Dtype.FLOAT16: 0.25}
"""Largest difference of logits, by dtype, in standard deviations of the reference's: what is read at a wrong
place differs by several. ``verify`` is the gate that measures noise."""


def prove_engine(
    bundle: Bundle, open_engine: Callable[[Heads], Session], max_batch: int, max_seq: int
) -> None:
    """One step at the largest batch, then two rows as ONNX Runtime's CPU provider has them.

    With all heads, where nothing but rounding can differ; with CHAI's too in float32, or if maps are fixed.

    Args:
        bundle: that the engine was built from.
        open_engine: a session of the engine with these heads.
        max_batch: most rows of the engine.
        max_seq: most tokens of a row.

    Raises:
        ChaiError: the engine does not run, its logits are not finite, or they are others than ONNX Runtime's.
    """
    session = open_engine(Heads.CHAI)
    session.begin(max_batch, 1)
    logits = _step(session, np.zeros((max_batch, 1), np.int64), 0)
    if not np.isfinite(logits).all():
        raise ChaiError(
            f"the engine of {bundle.path} gives logits that are not finite; export with another --dtype"
        )
    session.drop()
    why_not = _why_no_reference(bundle)
    if why_not is not None:
        note(f"the engine is not compared with ONNX Runtime: {why_not}")
        return
    static = bundle.manifest.static is not None
    if static or bundle.manifest.dtype == Dtype.FLOAT32:
        _compare(bundle, session, Heads.CHAI, min(2, max_batch), max_seq)
    if not static:
        _compare(bundle, open_engine(Heads.ALL), Heads.ALL, min(2, max_batch), max_seq)


def _why_no_reference(bundle: Bundle) -> str | None:
    manifest = bundle.manifest
    if manifest.dtype not in _ALLOWED:
        return f"that does not compute {manifest.dtype} on a CPU"
    size = sum(record.size for name, record in manifest.files.items() if name.startswith("model.onnx"))
    return "its weights do not fit in memory beside the engine's" if size > available_memory() else None


def _compare(bundle: Bundle, session: Session, heads: Heads, rows: int, max_seq: int) -> None:
    manifest = bundle.manifest
    tokens = max(1, min(manifest.probe_tokens + 2, max_seq - DECODES))
    steps = min(DECODES, max_seq - tokens)
    reference = OnnxRuntimeSession(bundle, heads)
    for each in (session, reference):
        each.begin(rows, tokens + steps)
    fed = np.random.default_rng(1).integers(manifest.vocab_size, size=(rows, tokens))
    past = 0
    for number in range(1 + steps):
        found, wanted = (_step(each, fed, past) for each in (session, reference))
        difference = float(np.abs(found - wanted).max() / max(float(wanted.std()), 1e-6))
        # Not "greater": what is no number is no agreement either.
        if not difference <= _ALLOWED[Dtype(manifest.dtype)]:
            where = "a prompt" if number == 0 else f"decode step {number}"
            raise ChaiError(
                f"the engine of {bundle.path} does not compute what ONNX Runtime does: with {heads} heads "
                f"logits of {where} differ by {difference:.2g} standard deviations; the engine was not "
                "kept, report this with the output of `chai-export doctor`"
            )
        past += fed.shape[1]
        fed = wanted.argmax(axis=-1).reshape(rows, 1)
    for each in (session, reference):
        each.drop()


def _step(session: Session, fed: NDArray[np.int64], past: int) -> NDArray[np.float32]:
    """Logits after the last of the tokens [B,S]."""
    rows, tokens = fed.shape
    return session.step(
        fed.astype(np.int64),
        np.full(rows, tokens, np.int32),
        np.full(rows, past, np.int32),
        np.full((rows, 1), tokens - 1, np.int64),
    )
