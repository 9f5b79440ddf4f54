"""The export stage: a Hugging Face model goes in, a proven bundle comes out."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chai_export.arguments import path_of
from chai_export.bundle.atomic import atomic_directory
from chai_export.bundle.choices import Membership, SourceKind
from chai_export.clustering.probe import probe_length
from chai_export.errors import ChaiError, UsageError
from chai_export.exporter.block_weights import check_weights
from chai_export.exporter.torch_export import export_onnx
from chai_export.graph.weights.quantise import Method, WeightFormat, WeightType
from chai_export.models.loading import load_model
from chai_export.models.tokenizer import load_tokenizer
from chai_export.op.dtypes import Dtype
from chai_export.op.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Source
    from chai_export.bundle.write import Surroundings
    from chai_export.clustering.plan import Chosen
    from chai_export.models.text import Text

_WORK = ".source"
"""Directory in the unfinished bundle for the graph before the rewrite: its weights are moved out of it."""


def export(
    model: str | Path | PreTrainedModel,
    clusters: Chosen | str | Path | None,
    out_dir: str | Path,
    *,
    dtype: Dtype | str = Dtype.FLOAT32,
    probe_tokens: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    membership: Membership | str = Membership.ONLINE,
    text: Text | Iterable[Text] | None = None,
    weights: WeightType | str | None = None,
    weight_block: int = 32,
    weight_method: Method | str = Method.RTN,
    quantise_head: bool = True,
    trust_remote_code: bool = False,
) -> Bundle:
    """Export a Hugging Face model to ONNX, rewrite its attention and write a bundle.

    Args:
        model: directory or hub id, or a loaded causal language model.
        clusters: a plan, or how many KV heads each layer keeps, or the path of either; None keeps them all.
        out_dir: the bundle's directory; an earlier bundle there is replaced in one step.
        dtype: "float32", "float16" or "bfloat16", of weights and caches.
        probe_tokens: P, the tokens that decide the head map of a request; unless given, what ``clusters`` was
            calibrated with (the paper's 5 where it does not say).
        key_bits: keys are cached in 16 (float16), 8 or 4 bits. Unless given, as planned, or in the
            model's dtype where there is no plan.
        value_bits: likewise for values.
        membership: "online", head maps from each sequence's first tokens, or "static", maps fixed now on
            ``text`` and the projections of unused heads cut away.
        text: calibration text for static membership, one or several.
        weights: "int4" or "int8": matrices are stored in blocks of such codes, which the operator MatMulNBits
            multiplies by; None leaves them in ``dtype``. The embedding stays as it is.
        weight_block: codes that share a scale, 32 or 128.
        weight_method: "rtn" (the nearest code) or "hqq".
        quantise_head: store the head in 8 bits.
        trust_remote_code: run Python code that the model brings along.

    Raises:
        UsageError: an argument is of another kind or out of range, or static membership without a text.
        ChaiError: the model cannot be loaded or expressed (layer and reason), clusters do not fit, the proof
            fails, or the output cannot be written.
    """
    from chai_export.bundle.bundle import MODEL_FILE, Bundle, finalise
    from chai_export.bundle.parts import BUNDLE
    from chai_export.bundle.write import write_bundle
    from chai_export.clustering.plan import every_head, load_plan, precision_of
    from chai_export.exporter.static_membership import choose_and_slice, fix_head_maps
    from chai_export.graph.pipeline import rewrite_model
    from chai_export.models.kv_sources import describe_model, kv_source_layers

    dtype, membership = Dtype(dtype), Membership(membership)
    if membership is Membership.STATIC and text is None:
        raise UsageError("--membership static decides the head maps now; give calibration text with --text")
    form = WeightFormat.asked(weights, weight_block, weight_method)
    if form is not None:
        check_weights(form, dtype, static=membership is Membership.STATIC)
    Precision.asked(key_bits, value_bits)  # before a file is read: what is out of range is refused at once
    out_dir = path_of(out_dir, "the output")
    chosen = None if clusters is None else load_plan(clusters)
    precision = precision_of(chosen, key_bits, value_bits)
    probe = probe_length(probe_tokens, chosen)
    sources = [model, clusters, *(text if isinstance(text, list | tuple) else [text])]
    with atomic_directory(out_dir, BUNDLE, sources=sources) as directory:
        loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        chosen = chosen or every_head(describe_model(loaded))
        source, surroundings = _describe(model, loaded, chosen)
        static = None
        if membership is Membership.STATIC:
            assert text is not None
            if kv_source_layers(loaded) is not None:
                raise ChaiError(
                    "layers of this model read another layer's KV cache, for which static membership is not "
                    "supported; use --membership online"
                )
            if loaded is model:
                loaded = copy.deepcopy(loaded)  # the caller's model keeps its heads
            static = choose_and_slice(loaded, chosen, text, surroundings.tokenizer)
        work = directory / _WORK
        work.mkdir()
        path = (
            export_onnx(loaded, work)
            if form is None
            else export_onnx(loaded, work, weights=form, quantise_head=quantise_head)
        )
        # The torch weights are on disk now; the rewrite must not pay for them in memory.
        del loaded
        gc.collect()
        draft = rewrite_model(path, chosen, directory, probe, precision=precision, take=True)
        shutil.rmtree(work)
        manifest = write_bundle(directory, draft, chosen, source, surroundings)
        if static is not None:
            fix_head_maps(directory / MODEL_FILE, np.array(static.head_maps, np.int32))
            finalise(directory, manifest.model_copy(update={"static": static}))
    return Bundle.load(out_dir)


def _describe(
    model: str | Path | PreTrainedModel, loaded: PreTrainedModel, clusters: Chosen
) -> tuple[Source, Surroundings]:
    """Where the model came from and what comes with it; checks the clusters before any work is done.

    Raises:
        ChaiError: clusters do not fit the model, or its tokenizer is damaged.
    """
    from chai_export.bundle.manifest import Source
    from chai_export.bundle.write import Surroundings
    from chai_export.models.kv_sources import describe_model
    from chai_export.models.rope import rope_of

    geometry = describe_model(loaded)
    clusters.check(geometry)
    named = isinstance(model, str | Path)
    name = Path(model).name if named else str(loaded.config.name_or_path or type(loaded).__name__)
    surroundings = Surroundings(
        tokenizer=load_tokenizer(model) if named else None,
        config=loaded.config,
        generation_config=loaded.generation_config,
        max_positions=geometry.max_positions,
        context_length=geometry.context_length,
        rope=rope_of(loaded.config).record(),
    )
    return Source(kind=SourceKind.HF, name=name, model_type=geometry.model_type), surroundings
