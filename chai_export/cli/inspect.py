"""`chai-export inspect`: what is inside a bundle or an ONNX file."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.bundle.work_directory import recover
from chai_export.cli.output import print_json, print_table
from chai_export.models.support import layer_ranges
from chai_export.units import bytes_text

if TYPE_CHECKING:
    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import Manifest, RopeRecord
    from chai_export.graph.explain.explanation import Explanation

NAME = "inspect"
HELP = "Show what is inside a bundle or an ONNX file: layers, kept heads, ops, cache bytes, files."
EXAMPLE = "chai-export inspect ./bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "path", metavar="BUNDLE|ONNX", type=Path, help="a bundle, an ONNX file or its directory"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Inspect either kind."""
    from chai_export.bundle.bundle import Bundle
    from chai_export.bundle.manifest import FILE_NAME

    recover(arguments.path)
    if (arguments.path / FILE_NAME).is_file():
        print_bundle(Bundle.load(arguments.path), as_json=arguments.json)
        return 0
    from chai_export.graph.stage import explain

    return print_explanation(explain(arguments.path), as_json=arguments.json)


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """JSON object of ``inspect --json`` for a bundle; byte counts are for one token of one row."""
    from chai_export.bundle.op_nodes import bundle_op_counts

    manifest = bundle.manifest
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "model": manifest.source.name,
        "model_type": manifest.source.model_type,
        "dtype": manifest.dtype,
        "weights": manifest.weight_type,
        "num_layers": manifest.num_layers,
        "num_query_heads": manifest.num_query_heads,
        "num_kv_heads": manifest.num_kv_heads,
        "head_dim": manifest.head_dim,
        "kept_heads": list(manifest.kept_heads),
        "op_version": manifest.op_version,
        "key_bits": list(manifest.storage.key_bits),
        "value_bits": list(manifest.storage.value_bits),
        "group": manifest.storage.group if manifest.storage.quantises else None,
        "kv_source_layers": manifest.kv_source_layers,
        "windows": manifest.windows,
        "probe_tokens": manifest.probe_tokens,
        "max_positions": manifest.max_positions,
        "context_length": manifest.context_length,
        "rope": manifest.rope.model_dump(mode="json") if manifest.rope else None,
        "ops": bundle_op_counts(bundle),
        "kv_bytes_per_token": manifest.kv_bytes_per_token("chai"),
        "kv_bytes_per_token_all_heads": manifest.kv_bytes_per_token("all"),
        "kv_bytes_per_token_float16": manifest.kv_bytes_per_token_float16,
        "kv_bytes_by_window": [
            {"window": window, "bytes_per_token": size}
            for window, size in manifest.kv_bytes_by_window("chai").items()
        ],
        "kv_bytes_by_part": asdict(manifest.kv_bytes_by_part("chai")),
        "proof": manifest.proof.model_dump(mode="json") if manifest.proof else None,
        "engines": {name: record.runtime_version for name, record in manifest.engines.items()},
        "files": {name: record.size for name, record in manifest.files.items()},
    }


def print_bundle(bundle: Bundle, *, as_json: bool) -> None:
    """Print a bundle's description as JSON or for people."""
    facts = describe_bundle(bundle)
    if as_json:
        print_json(facts)
        return
    cache, full = facts["kv_bytes_per_token"], facts["kv_bytes_per_token_all_heads"]
    print_table(
        ["bundle", facts["path"]],
        [
            ("model", f"{facts['model']} ({facts['model_type'] or 'unknown type'}), {_types(facts)}"),
            ("layers", facts["num_layers"]),
            (
                "heads",
                f"{facts['num_query_heads']} query, {facts['num_kv_heads']} KV, head dim {facts['head_dim']}",
            ),
            ("kept KV heads", ", ".join(map(str, facts["kept_heads"]))),
            *_shared_caches(facts["kv_source_layers"]),
            *_windows(facts["windows"]),
            *_rope(bundle.manifest.rope),
            (
                "KV cache per token",
                f"{bytes_text(cache)} (all heads: {bytes_text(full)}, saved {1 - cache / full:.1%})",
            ),
            *_by_length(bundle.manifest),
            *_storage(bundle.manifest),
            *([("proven", facts["proof"]["compared"])] if facts["proof"] else []),
            ("engines", ", ".join(facts["engines"]) or "none; `chai-export build` makes one"),
        ],
    )
    print()
    most_first = Counter(facts["ops"]).most_common()
    print_table(["op", "count"], most_first)
    print()
    print_table(["file", "size"], [(name, bytes_text(size)) for name, size in facts["files"].items()])


def _windows(windows: list[int] | None) -> list[tuple[str, str]]:
    """Which layers see how many positions; nothing where all see all."""
    if windows is None:
        return []
    said = []
    for window in sorted(set(windows)):
        layers = [layer for layer, each in enumerate(windows) if each == window]
        said.append(f"{window or 'all'} in {layer_ranges(layers)}")
    return [("positions seen", "; ".join(said))]


def _by_length(manifest: Manifest) -> list[tuple[str, str]]:
    """What texts of some lengths take, where layers have a window; nothing else."""
    windows = [window for window in manifest.cache_windows if window]
    if not windows:
        return []
    longest = manifest.max_positions or manifest.context_length or 0
    lengths = sorted({*windows, 4 * windows[-1], max(longest, windows[-1])})
    sizes = [f"{bytes_text(manifest.kv_bytes_of(tokens))} at {tokens} tokens" for tokens in lengths]
    return [("KV cache of a text", ", ".join(sizes))]


def _storage(manifest: Manifest) -> list[tuple[str, str]]:
    """Rows that say what the caches hold."""
    storage, parts = manifest.storage, manifest.kv_bytes_by_part("chai")
    named = [
        f"{what} in {_bits(bits, manifest.dtype)}"
        for what, bits in (("keys", storage.key_bits), ("values", storage.value_bits))
    ]
    shared = f", {storage.group} elements to a scale" if storage.quantises else ""
    sizes = f"keys {bytes_text(parts.keys)}, values {bytes_text(parts.values)}"
    scales = f", scales {bytes_text(parts.scales)}" if parts.scales else ""
    float16 = manifest.kv_bytes_per_token_float16
    share = manifest.kv_bytes_per_token("chai") / float16
    return [
        ("cache", f"{', '.join(named)}{shared}"),
        ("of that", sizes + scales),
        ("all heads in float16", f"{bytes_text(float16)}; this bundle takes {share:.1%} of that"),
    ]


def _bits(bits: Sequence[int], dtype: str) -> str:
    """ "8 bits", or by layer where they differ."""
    words = [{0: dtype, 16: "float16"}.get(each, f"{each} bits") for each in bits]
    return words[0] if len(set(words)) == 1 else ", ".join(words) + " by layer"


def _types(facts: dict[str, Any]) -> str:
    """Of weights and caches, once where they are the same."""
    same = facts["weights"] == facts["dtype"]
    return facts["dtype"] if same else f"{facts['weights']} weights, {facts['dtype']} cache"


def _shared_caches(sources: list[int] | None) -> list[tuple[str, str]]:
    """A row that says which layer's cache the layers without one read; none if all have one."""
    if sources is None:
        return []
    read = [f"layer {layer} reads layer {source}" for layer, source in enumerate(sources) if layer != source]
    return [("shared caches", ", ".join(read))]


def _rope(rope: RopeRecord | None) -> list[tuple[str, str]]:
    """Rows that say what rotary embedding makes of long texts; none where it is the plain one."""
    if rope is None:
        return []
    rows = [("rotary embedding", ", ".join(rope.types))] if rope.types else []
    if rope.switch_lengths:
        lengths = ", ".join(map(str, rope.switch_lengths))
        rows.append(("past tokens", f"{lengths}: other rotary factors, and a row's cache is computed anew"))
    if rope.last_length is not None:
        rows.append(
            ("positions end", f"at {rope.last_length}: the graph has no rotary factors for longer rows")
        )
    return rows


def print_explanation(explanation: Explanation, *, as_json: bool) -> int:
    """Print what the rewrite finds in an ONNX file; exit code 0 if it can be rewritten, else 1."""
    if as_json:
        print_json(explanation.to_json())
    else:
        print_table(explanation.columns, explanation.rows())
        print(explanation.verdict)
        print(explanation.needs.describe())
        for letter, description in explanation.forms.items():
            print(f"form {letter}: {description}")
    return 0 if explanation.rewritable else 1
