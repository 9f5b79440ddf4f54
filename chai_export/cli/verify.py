"""`chai-export verify`: the gate between a bundle and its use."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chai_export.bundle.choices import Backend
from chai_export.cli.output import print_json, print_table

if TYPE_CHECKING:
    from chai_export.quality.verdict import VerifyResult

NAME = "verify"
HELP = (
    "Compare a bundle with the model or ONNX file it came from; exit 1 unless logits and greedy tokens agree."
)
EXAMPLE = "chai-export verify ./bundle --reference ./model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory from `export` or `rewrite`")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        required=True,
        help="the Hugging Face model it came from, or the ONNX file (or a folder with it)",
    )
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="text for the prompts (default: random tokens)"
    )
    parser.add_argument(
        "--backend", metavar="NAME", default=Backend.ONNXRUNTIME, help="(default %(default)s)"
    )
    parser.add_argument(
        "--polygraphy",
        action="store_true",
        help="also compare each attention of the TensorRT engine with ONNX Runtime's",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def execute(arguments: argparse.Namespace) -> int:
    """Verify and show each figure beside its tolerance."""
    from chai_export.quality.verdict import EXACT_ROWS
    from chai_export.quality.verify import verify

    result = verify(
        arguments.bundle,
        arguments.reference,
        text=arguments.text,
        backend=arguments.backend,
        trust_remote_code=arguments.trust_remote_code,
    )
    report = result.to_json()
    layers = _compare_layers(arguments.bundle) if arguments.polygraphy else []
    if layers:
        report["layers"] = layers
    if arguments.json:
        print_json(report)
        return 0 if result.ok else 1
    if any(gate.name != EXACT_ROWS for gate in result.gates):
        _print_gates(result)
    else:
        _print_against_model(report)
    if layers:
        differences = [
            (x["index"], x["name"], f"{x['max_abs_diff']:.2e}", f"{x['max_abs']:.2e}") for x in layers
        ]
        print_table(["layer", "attention", "largest difference", "largest value"], differences)
    for boundary in result.boundaries:
        print(f"boundary at {boundary.length} tokens: {boundary.reason or 'compared on both sides'}")
    print(f"head-map agreement: {report['head_map_agreement']:.4f}")
    print("verified" if result.ok else "NOT verified: this bundle does not compute what its model computes")
    return 0 if result.ok else 1


def _print_gates(result: VerifyResult) -> None:
    """What was compared with an ONNX file."""
    against = {
        "exact": "the file, both in float32 with nothing rounded",
        "as written": "the file as it is, fed alike",
        "chai": "the op's function body",
    }
    rows = [
        (gate.heads, against[gate.name], f"{gate.max_abs_logit_diff:.2e}", f"{gate.tolerance_used:.0%}")
        for gate in result.gates
    ]
    print_table(["heads", "against", "largest logit difference", "of what rounding allows"], rows)
    for name, reason in result.not_compared.items():
        print(f"{name}: not compared, {reason}")
    print(f"greedy tokens: {'identical' if result.greedy_match['all'] else 'DIFFERENT'}")
    _print_distance(result.distance_to_exact)


def _print_distance(distance: dict[str, dict[str, float]] | None, rounded: str = "the cache's bits") -> None:
    for heads, figures in (distance or {}).items():
        print(
            f"what {rounded} cost, {heads}: logits differ from those of the exact model by up to "
            f"{figures['max_abs_logit_diff']:.2e}, KL {figures['kl']:.2e} nats"
        )


def _print_against_model(report: dict[str, Any]) -> None:
    """What was compared with a Hugging Face model."""
    distance = report["distance_to_exact"]
    model = "Hugging Face model" if distance is None else "torch oracle with all heads"
    rows = [
        (
            heads,
            against,
            f"{report['max_abs_logit_diff'][heads]:.2e}",
            f"{report['tolerance_used'][heads]:.0%}",
            "identical" if report["greedy_match"][heads] else "DIFFERENT",
        )
        for heads, against in (("all", model), ("chai", "torch oracle"))
        if report["max_abs_logit_diff"][heads] is not None
    ]
    print_table(
        ["heads", "against", "largest logit difference", "of what rounding allows", "greedy tokens"], rows
    )
    for gate in report["gates"]:
        print(
            f"{gate['heads']}, rows as they are computed: largest logit difference "
            f"{gate['max_abs_logit_diff']:.2e}, {gate['tolerance_used']:.0%} of what rounding allows"
        )
    weights = report["weights"]
    _print_distance(
        distance, "the cache's bits" if weights is None else "8-bit activations and the cache's bits"
    )
    if weights is not None:
        print(
            f"weights: {weights['matrices']} matrices in {weights['type']}, the farthest number is at "
            f"{weights['farthest']:.0%} of what nearest codes allow ({weights['worst']}); logits were "
            "compared with exact activations"
        )
    if report["max_abs_logit_diff"]["all"] is None:
        print("all heads: not compared, static membership has cut away the heads it does not keep")


def _compare_layers(path: Path) -> list[dict[str, Any]]:
    """What `--polygraphy` adds; the verdict stays with the logits and tokens."""
    from chai_export.bundle.bundle import Bundle
    from chai_export.engines.tensorrt_layers import compare_layers

    return [asdict(layer) for layer in compare_layers(Bundle.load(path))]
