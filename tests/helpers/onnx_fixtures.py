"""The fixture graphs of tests/fixtures, typed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1] / "fixtures"


@dataclass(frozen=True)
class Fixture:
    name: str

    @property
    def path(self) -> Path:
        return ROOT / "onnx" / self.name

    @cached_property
    def record(self) -> dict[str, Any]:
        return json.loads((self.path / "fixture.json").read_text())

    @property
    def model(self) -> Path:
        return ROOT / "models" / self.record["model"]

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.model / "config.json").read_text())

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def query_heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return self.config["num_key_value_heads"]

    @property
    def quantised(self) -> bool:
        return "int4" in self.name

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.record["dtype"] == "float32" else 2e-2

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        with np.load(self.path / "reference.npz") as arrays:
            return dict(arrays)


ALL = [Fixture(path.name) for path in sorted((ROOT / "onnx").iterdir())]
REWRITTEN = [fixture for fixture in ALL if fixture.record["refused"] is None]
REFUSED = [fixture for fixture in ALL if fixture.record["refused"] is not None]
