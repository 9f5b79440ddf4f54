"""All addresses of the server as one ASGI application."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse

from chai_export.serve.api.chat import chat
from chai_export.serve.api.completions import completions
from chai_export.serve.api.errors import ApiError, add_handlers
from chai_export.serve.api.guards import Guards
from chai_export.serve.api.metrics import Metrics, metrics_route
from chai_export.serve.model import ServedModel
from chai_export.version import __version__


def make_app(model: ServedModel, keys: Sequence[str] = ()) -> FastAPI:
    """The application for a model whose engine runs.

    Args:
        model: what is served; its owner closes it.
        keys: one of which each request to /v1/ must bring; none: nobody needs one.
    """
    # No pages with an API browser: those load scripts from elsewhere.
    app = FastAPI(title="chai-export", version=__version__, openapi_url=None)
    app.add_middleware(Guards, keys=keys)
    add_handlers(app)
    metrics = Metrics(model)
    model.engine.ended = metrics.observe
    app.include_router(metrics_route(metrics))
    app.include_router(completions(model))
    app.include_router(chat(model))
    card: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "chai_export",
        "max_model_len": model.positions,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model.name:
            raise ApiError(404, f"there is no model {name!r}; this server has {model.name!r}")
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = model.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    return app
