"""The JSON object of `run --json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from chai_export.runtime.runner import Generation, Runner


def run_report(runner: Runner, generations: Sequence[Generation]) -> dict[str, Any]:
    """What `run --json` prints about the runner's last call; times in milliseconds, sizes in bytes."""
    return {
        "results": [asdict(generation) for generation in generations],
        "heads": runner.heads,
        "backend": runner.backend,
        "weights": runner.bundle.manifest.weight_type,
        "ttft_ms": runner.timings.ttft_ms,
        "tpot_ms": runner.timings.tpot_ms,
        "kv_cache_bytes": runner.kv_cache_bytes,
        "kv_cache_bytes_all_heads": runner.kv_cache_bytes_all_heads,
    }
