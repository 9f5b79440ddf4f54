"""What an interrupted measurement of a plan leaves behind, so that it goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.atomic import atomic_file
from chai_export.clustering.state import STATE, remove_state, state_key
from chai_export.errors import ChaiError
from chai_export.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = "chai-calibration-state/1"


class PlanState:
    """Peaks of keys and the damage of the windows measured so far, in memory and in a file.

    Args:
        path: the file; None: nothing is kept.
        key: hash of everything that the measurement depends on. A file with another key counts as none.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._content: dict[str, Any] = {"format": _FORMAT, "key": key}
        if path is None:
            return
        try:
            content = read_json(path, fix="")
            if content["format"] == _FORMAT and content["key"] == key:
                self._content = content
                _ = self.damage
        except (ChaiError, KeyError, TypeError, ValueError):
            self._content = {"format": _FORMAT, "key": key}

    @staticmethod
    def nowhere() -> PlanState:
        """One that keeps nothing."""
        return PlanState(None, "")

    @staticmethod
    def of(
        path: Path | None, model: PreTrainedModel, windows: NDArray[np.int32], settings: dict[str, Any]
    ) -> PlanState:
        """The state of a measurement of ``model`` on ``windows``."""
        return PlanState(path, "" if path is None else state_key(model, windows, settings))

    @property
    def peaks(self) -> Any:
        """[L][G][D], or None before they are known."""
        return self._content.get("peaks")

    @property
    def damage(self) -> list[NDArray[np.float64]]:
        """Of each window that was measured, see :func:`chai_export.models.option_damage.option_damage`."""
        return [np.array(window, np.float64) for window in self._content.get("damage", [])]

    def keep(self, **content: Any) -> None:
        """Add to what is kept, and write it.

        Raises:
            ChaiError: it cannot be written.
        """
        self._content |= content
        if self._path is not None:
            with atomic_file(self._path, STATE) as partial:
                partial.write_text(json.dumps(self._content), encoding="utf-8")

    def remove(self) -> None:
        """Nothing is left to resume."""
        if self._path is not None:
            remove_state(self._path)
