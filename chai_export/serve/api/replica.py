"""What the process of a replica holds: one model, which the application serves and Ray asks about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from chai_export.errors import ChaiError
from chai_export.serve.api.app import make_app
from chai_export.serve.model import ServedModel, open_model

_served: list[ServedModel] = []


def replica_app(bundle: str, keys: Sequence[str], **options: Any) -> FastAPI:
    """Open a bundle and make its application; once in a process.

    Args:
        bundle: path.
        keys: see :func:`chai_export.serve.api.app.make_app`.
        options: of :func:`chai_export.serve.model.open_model`.
    """
    model = open_model(bundle, **options)
    _served.append(model)
    return make_app(model, keys)


def require_alive() -> None:
    """What Ray asks from time to time; a replica that fails it is replaced.

    Raises:
        ChaiError: the engine of this process has ended.
    """
    if not all(model.engine.alive for model in _served):
        raise ChaiError("the engine has ended; Ray replaces this replica")
