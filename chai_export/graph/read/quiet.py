"""Keep what onnx_ir logs away from people who did not ask for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_onnx_ir() -> Iterator[None]:
    """Let onnx_ir log errors only; also a decorator.

    It warns of shapes that it cannot infer (with a traceback) and of values without a type. Nobody relies on
    either: who needs one and finds none refuses with a reason of its own.
    """
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
