"""Replicas of the server as an application of Ray Serve, which starts them and spreads requests among them.

A replica is a whole engine with its own cache; replicas share nothing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chai_export.errors import ChaiError
from chai_export.serve.api.replica import replica_app, require_alive
from chai_export.serve.model import DEFAULT_MAX_ROWS, DEFAULT_MAX_WAITING

GRACE_SECONDS = 300
_BY_SESSION = "ray.serve.experimental.consistent_hash_router"


def application(
    bundle: str | Path,
    *,
    replicas: int = 1,
    autoscaling: Mapping[str, Any] | None = None,
    by_session: bool = False,
    keys: Sequence[str] = (),
    max_rows: int = DEFAULT_MAX_ROWS,
    max_waiting: int = DEFAULT_MAX_WAITING,
    **options: Any,
) -> Any:
    """What ``ray.serve.run`` runs.

    Args:
        bundle: a path that every machine of the cluster has.
        replicas: so many, unless ``autoscaling`` is given.
        autoscaling: Ray's ``autoscaling_config``, passed through.
        by_session: requests with one ``x-session-id`` go to one replica, which has the beginning of their
            prompts in its cache, while it lives and takes them; else Ray looks at the load alone.
        keys: see :func:`chai_export.serve.api.app.make_app`.
        max_rows: of a replica.
        max_waiting: of a replica.
        options: of :func:`chai_export.serve.model.open_model`.

    Raises:
        ChaiError: Ray is not installed, or is one that cannot route by session.
    """
    serve = _ray_serve()
    path, settings = (
        str(Path(bundle).resolve()),
        {"max_rows": max_rows, "max_waiting": max_waiting, **options},
    )

    def build() -> Any:
        """Runs in a replica."""
        return replica_app(path, list(keys), **settings)

    class Replica:
        """The application answers requests; this answers Ray."""

        def check_health(self) -> None:
            require_alive()

    scale: dict[str, Any] = {"num_replicas": replicas}
    if autoscaling is not None:
        scale = {"autoscaling_config": dict(autoscaling)}
    deployment = serve.deployment(
        name="chai_export",
        max_ongoing_requests=max_rows + max_waiting,
        graceful_shutdown_timeout_s=GRACE_SECONDS,
        **(_route_by_session() if by_session else {}),
        **scale,
    )
    return deployment(serve.ingress(build)(Replica)).bind()


def _route_by_session() -> dict[str, Any]:
    """Options of a deployment."""
    import ray

    try:
        importlib.import_module(_BY_SESSION)
        from ray.serve.config import RequestRouterConfig
    except ImportError as error:
        raise ChaiError(
            f"Ray {ray.__version__} cannot route by session ({error}); pip install --upgrade 'ray[serve]', "
            "or leave --by-session out"
        ) from error
    return {
        "request_router_config": RequestRouterConfig(
            request_router_class=f"{_BY_SESSION}.ConsistentHashRouter"
        )
    }


def start(app: Any, host: str, port: int) -> None:
    """Run an application on the cluster that RAY_ADDRESS names, or on one that is made on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    serve = _ray_serve()
    import ray

    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": host, "port": port})
    serve.run(app, name="chai_export", route_prefix="/")


def stop() -> None:
    """End the application, its running texts first."""
    import ray

    _ray_serve().shutdown()
    ray.shutdown()


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ChaiError(
            f"--ray needs Ray Serve, which is not installed ({error.name}); pip install 'chai-export[ray]'"
        ) from error
    return serve
