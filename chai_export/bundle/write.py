"""Make a rewritten graph a bundle: what comes with the model, then manifest.json as the last file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from chai_export.bundle.bundle import finalise
from chai_export.bundle.environment import save_environment
from chai_export.bundle.manifest import Manifest, RopeRecord, Source


@dataclass(frozen=True)
class Surroundings:
    """What comes with a model besides its graph; each part may be missing.

    ``tokenizer`` is a transformers tokenizer; ``config`` and ``generation_config`` are those of transformers
    or plain dictionaries. ``rope`` is what the configuration says of rotary embedding.
    """

    tokenizer: Any | None = None
    config: Any | None = None
    generation_config: Any | None = None
    max_positions: int | None = None
    context_length: int | None = None
    rope: RopeRecord | None = None


class ClustersFile(Protocol):
    """What a bundle is made with: a plan, or numbers of kept heads, and the name that it has in a bundle."""

    @property
    def file_name(self) -> str:
        """Relative to the bundle."""

    def to_text(self) -> str:
        """The text of the file."""


def write_bundle(
    directory: Path, draft: Manifest, clusters: ClustersFile, source: Source, surroundings: Surroundings
) -> Manifest:
    """Complete the bundle in ``directory``, which holds the rewritten graph and its weights.

    The caller makes ``directory`` appear in one step (:func:`~chai_export.bundle.atomic.atomic_directory`).

    Args:
        directory: where model.onnx is; every file in it becomes part of the bundle.
        draft: what is known from the graph.
        clusters: what the bundle is made with.
        source: where the model came from.
        surroundings: what comes with it.

    Returns:
        The manifest as it was written.

    Raises:
        OSError: the directory cannot be written.
    """
    (directory / clusters.file_name).write_text(clusters.to_text(), encoding="utf-8")
    generation = save_environment(
        directory,
        tokenizer=surroundings.tokenizer,
        config=surroundings.config,
        generation_config=surroundings.generation_config,
    )
    rope = _rope(draft.rope, surroundings.rope)
    last = rope.last_length if rope is not None else None
    limits = [n for n in (surroundings.max_positions, draft.max_positions, last) if n is not None]
    manifest = draft.model_copy(
        update={
            "source": source,
            "generation": generation,
            "max_positions": min(limits, default=None),
            "rope": rope,
            "context_length": surroundings.context_length,
        }
    )
    return finalise(directory, manifest)


def _rope(graph: RopeRecord | None, config: RopeRecord | None) -> RopeRecord | None:
    """The graph's switches with the configuration's types; None where rotary embedding is the plain one.

    A configuration may know of a switch that the graph does not have, since exporters keep the branch that
    they traced: positions end there then.
    """
    switches = graph.switch_lengths if graph is not None else []
    types = config.types if config is not None else []
    last = config.last_length if config is not None else None
    if config is not None and config.switch_lengths and not switches:
        last = min(length for length in (last, *config.switch_lengths) if length is not None)
    if not switches and last is None and set(types) <= {"default"}:
        return None
    return RopeRecord(types=types, switch_lengths=switches, last_length=last)
