"""How long a sequence a bundle can take on a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chai_export.runtime.runner import Runner


def position_limit(runner: Runner) -> int | None:
    """Tokens of the learned position table or of the engine, whichever is fewer; None without a limit."""
    manifest = runner.bundle.manifest
    engine = manifest.engines.get(runner.backend)
    limits = [limit for limit in (manifest.max_positions, engine and engine.max_seq) if limit]
    return min(limits, default=None)
