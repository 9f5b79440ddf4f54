"""How a packaged model is served: parameters of its config.pbtxt, which may be edited there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chai_export.bundle.choices import Backend, Heads
from chai_export.errors import ChaiError


@dataclass(frozen=True)
class Settings:
    """Arguments of :func:`chai_export.serve.model.open_model`; None leaves the choice to it."""

    backend: Backend = Backend.ONNXRUNTIME
    heads: Heads = Heads.CHAI
    max_rows: int | None = None
    max_waiting: int | None = None
    max_seq: int | None = None
    cache_memory: int | None = None

    def options(self) -> dict[str, Any]:
        """What was chosen, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> Settings:
        """From the server's form of a configuration, whose parameters are texts.

        Raises:
            ChaiError: a number is none.
            UsageError: a choice is unknown.
        """
        texts = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        numbers = {
            name: _whole(name, texts[name])
            for name in ("max_rows", "max_waiting", "max_seq", "cache_memory")
            if texts.get(name)
        }
        return cls(
            Backend(texts.get("backend", cls.backend)), Heads(texts.get("heads", cls.heads)), **numbers
        )


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ChaiError(f"parameter {name} of config.pbtxt is {text!r}; give a whole number") from None
