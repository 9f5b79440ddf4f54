"""The rewrite stage: an ONNX decoder goes in, a proven bundle comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.arguments import path_of
from chai_export.bundle.atomic import atomic_directory
from chai_export.bundle.choices import SourceKind
from chai_export.clustering.probe import probe_length
from chai_export.errors import ChaiError
from chai_export.graph.explain.count_ops import count_ops
from chai_export.graph.explain.estimate import estimate
from chai_export.graph.explain.explanation import Explanation
from chai_export.graph.match.find import Survey
from chai_export.graph.prove.survey import survey
from chai_export.graph.read.load import data_files, find_onnx, load_graph
from chai_export.graph.rewrite.rope_switch import find_switches
from chai_export.models.tokenizer import load_tokenizer
from chai_export.op.precision import Precision

if TYPE_CHECKING:
    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.write import Surroundings
    from chai_export.clustering.plan import Chosen


def rewrite(
    onnx_path: str | Path,
    clusters: Chosen | str | Path | None,
    out_dir: str | Path,
    *,
    tokenizer: str | Path | None = None,
    probe_tokens: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
) -> Bundle:
    """Rewrite an ONNX decoder made by another exporter into a bundle.

    Every attention is replaced by a ClusteredHeadAttention node with a compact cache, and the result is
    proven equal to the source (all heads kept) before the bundle appears.

    Args:
        onnx_path: an ONNX file, or a directory with one.
        clusters: a plan, or how many KV heads each layer keeps, or the path of either; None keeps them all.
        out_dir: the bundle's directory; an earlier bundle there is replaced in one step.
        tokenizer: directory with a Hugging Face tokenizer (and config.json, generation_config.json).
        probe_tokens: P, the tokens that decide the head map of a request; unless given, what ``clusters`` was
            calibrated with (the paper's 5 where it does not say).
        key_bits: keys are cached in 16 (float16), 8 or 4 bits. Unless given, as planned, or in the
            model's dtype where there is no plan.
        value_bits: likewise for values.

    Raises:
        UsageError: there is no storage of such bits.
        ChaiError: the file is damaged, an attention is not one that the op can express (layer, node and
            reason), clusters do not fit, the proof fails, or the output cannot be written.
    """
    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Source
    from chai_export.bundle.parts import BUNDLE
    from chai_export.bundle.write import write_bundle
    from chai_export.clustering.plan import every_head, load_plan, precision_of
    from chai_export.graph.pipeline import rewrite_model

    Precision.asked(key_bits, value_bits)  # before a file is read: what is out of range is refused at once
    path, out_dir = find_onnx(path_of(onnx_path, "the model")), path_of(out_dir, "the output")
    chosen = None if clusters is None else load_plan(clusters)
    precision = precision_of(chosen, key_bits, value_bits)
    probe = probe_length(probe_tokens, chosen)
    sources = [path, *data_files(path), clusters, tokenizer]
    surroundings = _surroundings(tokenizer, path.parent)
    model_type = (surroundings.config or {}).get("model_type")
    source = Source(kind=SourceKind.ONNX, name=path.name, model_type=model_type)
    with atomic_directory(out_dir, BUNDLE, sources=sources) as directory:
        draft = rewrite_model(path, chosen, directory, probe, precision=precision)
        write_bundle(directory, draft, chosen or every_head(draft.head_counts), source, surroundings)
    return Bundle.load(out_dir)


def explain(onnx_path: str | Path, clusters: Chosen | None = None) -> Explanation:
    """Say what the rewrite would match in an ONNX file, what stands in the way, and what it would take.

    Nothing is written, and no weights are read. ``clusters`` fill in the R of each layer and are checked.

    Raises:
        ChaiError: the file is missing or damaged.
    """
    from chai_export.graph.rewrite.draft import draft_manifest

    path = find_onnx(Path(onnx_path))
    model = load_graph(path)
    found, problem = Survey((), None), None
    try:
        found = survey(model)
        if found.sites and not found.refusals:
            draft = draft_manifest(path, model, found.sites, 1)
            if clusters is not None:
                clusters.check(draft.head_counts)
            if found.roles is not None:
                find_switches(model.graph, found.roles)
    except ChaiError as error:
        problem = str(error)
    kept = None if clusters is None else clusters.kept_heads
    return Explanation(str(path), found, count_ops(path), estimate(model, path), problem, kept)


def _surroundings(tokenizer: str | Path | None, beside: Path) -> Surroundings:
    """Tokenizer and configurations from ``tokenizer``, or configurations from beside the ONNX file."""
    from chai_export.bundle.write import Surroundings
    from chai_export.models.rope import rope_of

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
        rope=rope_of(config).record(),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ChaiError(f"{path} cannot be read ({error}); correct or remove it") from error
    return content if isinstance(content, dict) else None
