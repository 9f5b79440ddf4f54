"""The rewrite stage: an ONNX decoder goes in, a proven bundle comes out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.errors import ChaiError
from chai_export.graph.explain import Explanation

if TYPE_CHECKING:
    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Manifest, Source
    from chai_export.clustering.clusters import Clusters


@dataclass(frozen=True)
class Surroundings:
    """What comes with a model besides its graph; each part may be missing.

    ``tokenizer`` is a transformers tokenizer; ``config`` and ``generation_config`` are those of transformers
    or plain dictionaries.
    """

    tokenizer: Any | None = None
    config: Any | None = None
    generation_config: Any | None = None
    max_positions: int | None = None
    context_length: int | None = None


def rewrite(
    onnx_path: str | Path,
    clusters: Clusters | str | Path,
    out_dir: str | Path,
    *,
    tokenizer: str | Path | None = None,
    probe_tokens: int | None = None,
) -> Bundle:
    """Rewrite an ONNX decoder made by another exporter into a bundle.

    Every attention is replaced by a ClusteredHeadAttention node with a compact cache, and the result is
    proven equal to the source (all heads kept) before the bundle appears.

    Args:
        onnx_path: an ONNX file, or a directory with one.
        clusters: how many KV heads each layer keeps, or the path of a clusters.json.
        out_dir: the bundle's directory; an earlier bundle there is replaced in one step.
        tokenizer: directory with a Hugging Face tokenizer (and config.json, generation_config.json).
        probe_tokens: P, the tokens that decide the head map of a request; unless given, what ``clusters`` was
            calibrated with (5 where it does not say).

    Raises:
        ChaiError: the file is damaged, an attention is not one that the op can express (layer, node and
            reason), clusters do not fit, the proof fails, or the output cannot be written.
    """
    from chai_export.bundle.atomic import atomic_directory
    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Source
    from chai_export.graph.load import find_onnx

    path = find_onnx(Path(onnx_path))
    chosen = load_clusters(clusters)
    surroundings = _surroundings(tokenizer, path.parent)
    model_type = (surroundings.config or {}).get("model_type")
    source = Source(kind="onnx", name=path.name, model_type=model_type)
    with atomic_directory(out_dir) as directory:
        write_bundle(
            path, chosen, directory, source=source, surroundings=surroundings, probe_tokens=probe_tokens
        )
    return Bundle.load(out_dir)


def explain(onnx_path: str | Path, clusters: Clusters | None = None) -> Explanation:
    """Say what the rewrite would match in an ONNX file, what stands in the way, and what it would take.

    Nothing is written, and no weights are read. ``clusters`` fill in the R of each layer and are checked.

    Raises:
        ChaiError: the file is missing or damaged.
    """
    from chai_export.graph.draft import draft_manifest
    from chai_export.graph.estimate import estimate
    from chai_export.graph.find import Survey, survey
    from chai_export.graph.load import find_onnx, load_graph
    from chai_export.graph.summary import count_ops

    path = find_onnx(Path(onnx_path))
    model = load_graph(path)
    found, problem = Survey((), None), None
    try:
        found = survey(model)
        if found.sites and not found.refusals:
            draft = draft_manifest(path, model, found.sites, 1)
            if clusters is not None:
                clusters.check(draft)
    except ChaiError as error:
        problem = str(error)
    kept = None if clusters is None else clusters.kept_heads
    return Explanation(str(path), found, count_ops(path), estimate(model, path), problem, kept)


def load_clusters(clusters: Clusters | str | Path) -> Clusters:
    """The typed form of clusters given as such or as a path.

    Raises:
        ChaiError: the file is missing or malformed.
    """
    from chai_export.clustering.clusters import Clusters

    return clusters if isinstance(clusters, Clusters) else Clusters.load(clusters)


def write_bundle(
    path: Path,
    clusters: Clusters,
    directory: Path,
    *,
    source: Source,
    surroundings: Surroundings,
    probe_tokens: int | None,
    remove: Path | None = None,
) -> Manifest:
    """Rewrite ``path`` into ``directory``, prove it, and write manifest.json as the last file.

    ``remove`` is a directory of intermediate files, ``path`` among them, to delete before the bundle's files
    are hashed; the weights are moved out of it.

    The caller makes ``directory`` appear in one step (:func:`~chai_export.bundle.atomic.atomic_directory`).

    Raises:
        ChaiError: as :func:`rewrite`.
    """
    from chai_export.bundle.bundle import CLUSTERS_FILE, finalise
    from chai_export.bundle.environment import save_environment
    from chai_export.clustering.probe import probe_length
    from chai_export.graph.pipeline import rewrite_model

    probe = probe_length(probe_tokens, clusters)
    draft = rewrite_model(path, clusters, directory, probe, take=remove is not None)
    if remove is not None:
        shutil.rmtree(remove)
    clusters.save(directory / CLUSTERS_FILE)
    generation = save_environment(
        directory,
        tokenizer=surroundings.tokenizer,
        config=surroundings.config,
        generation_config=surroundings.generation_config,
    )
    limits = [n for n in (surroundings.max_positions, draft.max_positions) if n is not None]
    manifest = draft.model_copy(
        update={
            "source": source,
            "generation": generation,
            "max_positions": min(limits, default=None),
            "context_length": surroundings.context_length,
        }
    )
    return finalise(directory, manifest)


def _surroundings(tokenizer: str | Path | None, beside: Path) -> Surroundings:
    """Tokenizer and configurations from ``tokenizer``, or configurations from beside the ONNX file."""
    from chai_export.models.loading import load_tokenizer

    loaded = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        if loaded is None:
            raise ChaiError(f"{tokenizer} holds no tokenizer; name the directory of the Hugging Face model")
    where = Path(tokenizer) if tokenizer is not None and Path(tokenizer).is_dir() else beside
    config = _read_json(where / "config.json")
    context = (config or {}).get("max_position_embeddings")
    return Surroundings(
        tokenizer=loaded,
        config=config,
        generation_config=_read_json(where / "generation_config.json"),
        context_length=context if isinstance(context, int) and context > 0 else None,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ChaiError(f"{path} cannot be read ({error}); correct or remove it") from error
    return content if isinstance(content, dict) else None
