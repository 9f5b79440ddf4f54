"""What an interrupted calibration leaves behind, and whether it belongs to the one that goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.targets import FileKind, json_with_format, require_file_target
from chai_export.bundle.work_directory import WorkDirectory, fitting_name
from chai_export.clustering.curves import ErrorCurves
from chai_export.errors import ChaiError
from chai_export.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = "chai-calibration-state/1"
STATE = FileKind("the state of an interrupted calibration", json_with_format("chai-calibration-state"))
_VALUES_PER_WEIGHT = 64


def state_file(output: Path) -> Path:
    """Where a calibration that writes ``output`` keeps its state: beside it."""
    return output.with_name(fitting_name(output.name, output.parent, after=".state"))


def require_state_place(path: Path) -> None:
    """Raise unless ``path`` is free or holds a state: it will be written, and removed at the end.

    Raises:
        ChaiError: another file is in its place.
    """
    require_file_target(Path(os.path.realpath(path)), STATE, ())


def state_key(
    model: PreTrainedModel,
    windows: NDArray[np.int32],
    settings: dict[str, Any],
    *,
    every_value: bool = False,
) -> str:
    """Hash of everything a measurement depends on: configuration, weights, tokens and settings.

    Of each weight tensor some evenly spread values are hashed, enough to tell two checkpoints apart
    without reading gigabytes; ``every_value`` reads them all.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(model.config.to_json_string(use_diff=False).encode())
    digest.update(np.ascontiguousarray(windows).tobytes())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        step = 1 if every_value else max(1, flat.numel() // _VALUES_PER_WEIGHT)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_state(path: Path, key: str, curves: ErrorCurves, samples_done: int) -> None:
    """Write the state, whole or not at all.

    Raises:
        ChaiError: it cannot be written.
    """

    content = {
        "format": _FORMAT,
        "key": key,
        "samples_done": samples_done,
        "windows": curves.windows,
        "sums": curves.sums.tolist(),
    }
    with atomic_file(path, STATE) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def remove_state(path: Path) -> None:
    """Remove a state that is no longer needed, and what a killed process left of writing one."""
    path.unlink(missing_ok=True)
    WorkDirectory(Path(os.path.realpath(path))).release()


def load_state(path: Path, key: str, curves: ErrorCurves) -> int:
    """Fill ``curves`` from a state with the same key; returns the samples already done, else 0.

    A missing, damaged or foreign state is no error: the work starts from the beginning.
    """
    try:
        content = read_json(path, fix="")
        if content["format"] != _FORMAT or content["key"] != key:
            return 0
        sums = np.asarray(content["sums"], dtype=np.int64)
        windows, done = int(content["windows"]), int(content["samples_done"])
    except (ChaiError, ValueError, KeyError, TypeError, OverflowError):
        return 0
    if sums.shape != curves.sums.shape:
        return 0
    curves.sums[:] = sums
    curves.windows = windows
    return done
