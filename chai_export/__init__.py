"""chai_export: compile decoder-only language models for Clustered Head Attention (CHAI)."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from chai_export.version import __version__

# Read when onnxruntime is imported, which happens below this package only: else it writes an identity of this
# device and a database of events into the user's cache.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from chai_export.bundle.bundle import Bundle
    from chai_export.clustering.calibrate import calibrate
    from chai_export.clustering.clusters import Clusters
    from chai_export.clustering.plan import Plan
    from chai_export.engines.build import build
    from chai_export.errors import ChaiError
    from chai_export.exporter.stage import export
    from chai_export.graph.stage import rewrite
    from chai_export.quality.evaluate import evaluate
    from chai_export.quality.verify import verify
    from chai_export.runtime.runner import Generation, Runner, load

# Public name -> module. Resolved on first use (PEP 562): `chai-export --help` must not import torch.
_HOME = {
    "Bundle": "chai_export.bundle.bundle",
    "ChaiError": "chai_export.errors",
    "Clusters": "chai_export.clustering.clusters",
    "Generation": "chai_export.runtime.runner",
    "Plan": "chai_export.clustering.plan",
    "Runner": "chai_export.runtime.runner",
    "build": "chai_export.engines.build",
    "calibrate": "chai_export.clustering.calibrate",
    "evaluate": "chai_export.quality.evaluate",
    "export": "chai_export.exporter.stage",
    "load": "chai_export.runtime.runner",
    "rewrite": "chai_export.graph.stage",
    "verify": "chai_export.quality.verify",
}

__all__ = [
    "Bundle",
    "ChaiError",
    "Clusters",
    "Generation",
    "Plan",
    "Runner",
    "__version__",
    "build",
    "calibrate",
    "evaluate",
    "export",
    "load",
    "rewrite",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chai_export' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
