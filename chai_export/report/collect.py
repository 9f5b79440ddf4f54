"""What the report shows, as plain JSON values: read from the bundle, measured on sample prompts, or given.

Figures that a command prints (``eval``, ``verify``, ``compare``) are taken from that command's ``--json``
output, so that the page can never disagree with it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chai_export.bundle.tokenizer import encode
from chai_export.clustering.plan_parts import part_sentences
from chai_export.clustering.plan_tradeoff import tradeoff
from chai_export.errors import ChaiError
from chai_export.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Manifest
    from chai_export.clustering.plan import Plan
    from chai_export.runtime.runner import Runner

SAMPLE_PROMPTS = (
    "The following example shows how to use this function:",
    "Once upon a time there was a small village by the sea, and",
    "def read_lines(path):\n    with open(path) as file:\n        return",
    "Question: what is the difference between a list and a tuple?\nAnswer:",
)
"""Prompts whose head maps are shown when the user names none."""

_LIBRARIES = ("chai-export", "torch", "transformers", "onnx", "onnxruntime", "numpy")
_LONGEST_SEQUENCE = 131072
_CORRELATION_TOKENS = 32


def compiled(bundle: Bundle) -> dict[str, Any]:
    """What was compiled: sizes, kept heads, bytes, proof."""
    manifest = bundle.manifest
    chai, every = manifest.kv_bytes_per_token("chai"), manifest.kv_bytes_per_token("all")
    content = manifest.model_dump(mode="json", exclude={"files", "generation", "engines"})
    files = {name: record.size for name, record in manifest.files.items()}
    return {
        **content,
        "engines": sorted(manifest.engines),
        "file_bytes": sum(files.values()),
        "kv_bytes_per_token": chai,
        "kv_bytes_per_token_all_heads": every,
        "kv_bytes_per_token_float16": manifest.kv_bytes_per_token_float16,
        "kv_bytes_by_part": {heads: asdict(manifest.kv_bytes_by_part(heads)) for heads in ("chai", "all")},
        "kv_bytes_saved": manifest.head_counts.kv_bytes_saved(manifest.kept_heads),
    }


def planned(plan: Plan) -> dict[str, Any]:
    """What a plan says, with the trade-off that was measured; without the measurement itself."""
    content = plan.to_json()
    return {
        **{name: content.get(name) for name in ("rule", "layers", "expected", "checked", "kv_bytes_share")},
        "warning": plan.forced_warning(),
        "parts": [] if plan.heads is None else part_sentences(plan, plan.heads),
        "tradeoff": tradeoff(plan),
    }


def cache_growth(manifest: Manifest) -> list[dict[str, int]]:
    """KV bytes of one row at doubling sequence lengths, up to the model's context; windows hold no more than
    themselves."""
    longest = manifest.max_positions or manifest.context_length or 4096
    lengths = [64]
    while lengths[-1] < min(longest, _LONGEST_SEQUENCE):
        lengths.append(min(2 * lengths[-1], longest, _LONGEST_SEQUENCE))
    return [
        {
            "tokens": length,
            "chai": manifest.kv_bytes_of(length, "chai"),
            "all": manifest.kv_bytes_of(length, "all"),
        }
        for length in lengths
    ]


def head_maps(runner: Runner, prompts: Sequence[str]) -> dict[str, Any]:
    """Maps of sample prompts and how much they agree.

    Returns:
        ``prompts``, ``maps`` [prompt][layer][H]; ``stability`` [layer]: mean share of query heads with the
        same representative in two prompts; ``grouping`` [layer]: mean share of pairs of heads that go
        together in both or in neither, whoever represents them; ``together`` [layer][H][H]: share of prompts
        in which two heads have the same representative.
    """
    maps = np.stack([_map_of(runner, prompt) for prompt in prompts])
    same = (maps[:, None] == maps[None]).mean(axis=3)
    pairs = np.triu_indices(len(prompts), 1)
    stability = same[pairs].mean(axis=0) if len(prompts) > 1 else np.ones(maps.shape[1])
    joined = maps[..., :, None] == maps[..., None, :]
    heads = np.triu_indices(maps.shape[2], 1)
    grouping = np.ones(maps.shape[1])
    if len(prompts) > 1 and heads[0].size:
        links = joined[..., heads[0], heads[1]]
        grouping = (links[:, None] == links[None]).mean(axis=3)[pairs].mean(axis=0)
    return {
        "prompts": list(prompts),
        "maps": maps.tolist(),
        "stability": [round(float(share), 4) for share in stability],
        "grouping": [round(float(share), 4) for share in grouping],
        "together": np.round(joined.mean(axis=0), 4).tolist(),
    }


def correlations(model: PreTrainedModel, token_ids: Sequence[Sequence[int]]) -> list[list[list[float]]]:
    """Correlation of the heads' attention probabilities over the first tokens of each prompt: [L][H][H].

    Args:
        model: that the bundle came from.
        token_ids: prompts; of each the first 32 tokens are looked at.
    """
    from chai_export.models.oracle import probe_features

    values: list[list[NDArray[np.float32]]] = []
    for ids in token_ids:
        window = list(ids)[:_CORRELATION_TOKENS]
        layers = probe_features(model, [window], len(window))
        # Row 0 attends to itself whatever the head, and the upper triangle is zero for all.
        below = np.tril_indices(len(window))
        values.append([layer[0][:, below[0], below[1]][:, 1:] for layer in layers])
    joined = [np.concatenate(parts, axis=1) for parts in zip(*values, strict=True)]
    with np.errstate(invalid="ignore"):  # a head that never varies has no correlation; it counts as none
        matrices = [np.nan_to_num(np.corrcoef(layer)) for layer in joined]
    return [np.round(matrix, 4).tolist() for matrix in matrices]


def prompt_ids(runner: Runner, prompt: str) -> list[int]:
    """Token ids of a sample prompt; without a tokenizer, ids made from its characters."""
    if runner.tokenizer is None:
        return [ord(character) % runner.bundle.manifest.vocab_size for character in prompt]
    return encode(runner.tokenizer, prompt)


def environment() -> dict[str, str]:
    """Versions of what the page was made with; nothing that names the machine or its user."""
    found = {
        "python": platform.python_version(),
        "system": platform.system(),
        "architecture": platform.machine(),
    }
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_result(path: str | Path, command: str, *keys: str) -> dict[str, Any]:
    """The ``--json`` output of a command, from a file.

    Args:
        path: the file.
        command: its name.
        keys: of which the output has one.

    Raises:
        ChaiError: missing, not JSON, or not that command's output.
    """
    again = f"write it with chai-export {command} --json > {path}"
    content = read_json(path, fix=again)
    if not any(key in content for key in keys):
        names = " or ".join(map(repr, keys))
        raise ChaiError(f"{path} is not the output of chai-export {command} (no {names}); {again}")
    return content


def _map_of(runner: Runner, prompt: str) -> NDArray[np.int32]:
    runner.logits(prompt_ids(runner, prompt))
    return runner.head_maps[:, 0]
