"""The report stage: a bundle and the figures about it go in, one HTML page comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.choices import Backend
from chai_export.bundle.targets import FileKind, contains
from chai_export.errors import UsageError
from chai_export.report import collect
from chai_export.report.page import render

REPORT = FileKind(
    "a page of `chai-export report`", contains(b'<meta name="generator" content="chai_export report">')
)


def report(
    bundle: str | Path,
    out_file: str | Path,
    *,
    reference: str | Path | None = None,
    prompts: Sequence[str] = (),
    evaluation: str | Path | None = None,
    verification: str | Path | None = None,
    comparison: str | Path | None = None,
    backend: Backend | str = Backend.ONNXRUNTIME,
) -> dict[str, Any]:
    """Write one self-contained HTML page about a bundle.

    Args:
        bundle: directory of the bundle.
        out_file: the page.
        reference: the Hugging Face model; with it the page shows how heads correlate, and what the model and
            the bundle write after each prompt.
        prompts: sample prompts whose head maps are shown; a few of its own unless given.
        evaluation: output of ``chai-export eval --json``.
        verification: output of ``chai-export verify --json``.
        comparison: output of ``chai-export compare --json``, for what other methods cost.
        backend: engine that computes the head maps.

    Returns:
        Everything the page shows, as JSON values.

    Raises:
        ChaiError: the bundle, the model or a file cannot be used, or the page cannot be written.
        UsageError: a prompt is empty.
    """

    samples = list(prompts) or list(collect.SAMPLE_PROMPTS)
    if not all(samples):
        raise UsageError("--prompt is empty; give some text")
    # Files are read first: a wrong one should not cost the time of running the model.
    figures = {
        "eval": None if evaluation is None else collect.read_result(evaluation, "eval", "top1_agreement"),
        "verify": None if verification is None else collect.read_result(verification, "verify", "ok"),
        "compare": None
        if comparison is None
        else collect.read_result(comparison, "compare", "rows", "results"),
    }
    sources = [bundle, reference, evaluation, verification, comparison]
    with atomic_file(out_file, REPORT, sources=sources) as file:
        data = {**_collect(bundle, reference, samples, backend), **figures}
        file.write_text(render(data), encoding="utf-8")
    return data


def _collect(
    bundle: str | Path, reference: str | Path | None, samples: Sequence[str], backend: str
) -> dict[str, Any]:
    """What the page shows besides the figures of other commands."""
    from chai_export.clustering.clusters import Clusters
    from chai_export.clustering.plan import load_plan
    from chai_export.runtime.runner import load

    runner = load(bundle, backend=backend, heads="chai")
    correlations = texts = None
    if reference is not None:
        from chai_export.models.reference import load_reference
        from chai_export.report.texts import sample_texts

        model = load_reference(reference, runner.bundle.manifest)
        token_ids = [collect.prompt_ids(runner, text) for text in samples]
        correlations = collect.correlations(model, token_ids)
        texts = sample_texts(runner, model, samples, token_ids)
    chosen = load_plan(runner.bundle.clusters_path)
    plan = None if isinstance(chosen, Clusters) else collect.planned(chosen)
    clusters = chosen if isinstance(chosen, Clusters) else Clusters(chosen.kept_heads)
    return {
        "bundle": collect.compiled(runner.bundle),
        "clusters": clusters.to_json(),
        "plan": plan,
        "cache": collect.cache_growth(runner.bundle.manifest),
        "head_maps": collect.head_maps(runner, samples),
        "correlations": correlations,
        "texts": texts,
        "environment": collect.environment(),
    }
