"""What sharing scores costs the demo model: bytes saved, methods, probe lengths and budgets.

    python benchmarks/quality_tradeoff.py           # writes results/quality_tradeoff.json and docs/quality.md
    python benchmarks/quality_tradeoff.py --docs    # writes docs/quality.md from the results that are there

About fifteen minutes on one core. Head counts come from examples/text/calibration.txt, figures from
examples/text/heldout.txt, which the model has not seen. Everything runs in torch (`chai-export compare`).

What was tried and left out: more rounds of choosing than two, and full swaps (PAM), change nothing beyond
noise; distances on square roots of the probabilities (Hellinger) are better at some budgets
and worse at others; weighting later probe rows more is worse where the budget is easy.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quality_tables
import torch

from chai_export.bundle.atomic import atomic_file
from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.keep import Budget
from chai_export.clustering.measured_budget import predicted, spend
from chai_export.models.geometry import describe
from chai_export.models.loading import load_model
from chai_export.models.tokenizer import load_tokenizer
from chai_export.op.probe import MEASURED_PROBE_TOKENS, PAPER_PROBE_TOKENS
from chai_export.quality.method_comparison import Comparison, compare
from chai_export.quality.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "pydoc-5m"
CALIBRATION = ROOT / "examples" / "text" / "calibration.txt"
HELDOUT = ROOT / "examples" / "text" / "heldout.txt"
RESULTS = ROOT / "benchmarks" / "results" / "quality_tradeoff.json"
BUDGETS = (0.10, 0.15, 0.20, 0.214, 0.25, 0.30, 0.35, 0.40)
METHOD_BUDGETS = (0.214, 0.25, 0.30)
PAIRED_METHODS = ("chai", "k-means", "agglomerative-unmasked")
PAIRED_WINDOWS = 96
"""All of the held-out text: three methods are compared more sharply than the whole table has time for."""

PROBES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
METHOD_PROBES = (PAPER_PROBE_TOKENS, MEASURED_PROBE_TOKENS)
DAMAGE_PROBE = MEASURED_PROBE_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="only write docs/quality.md again")
    parser.add_argument("--windows", type=int, default=24, help="held-out sequences (default %(default)s)")
    parser.add_argument("--seq-len", type=int, default=300, help="tokens in each (default %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.docs:
        torch.set_num_threads(1)
        results = measure(arguments.windows, arguments.seq_len)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(arguments.output) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(arguments.output.read_text(encoding="utf-8"))
    with atomic_file(ROOT / "docs" / "quality.md") as partial:
        partial.write_text(quality_tables.page(results, _boards()), encoding="utf-8")


def _boards() -> list[dict[str, Any]]:
    """What scoreboard.py measured: the demo model first, short sequences first."""
    found = (
        json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.parent.glob("scoreboard-*.json")
    )
    return sorted(found, key=lambda board: (board["model"], board["seq_len"]))


def measure(windows: int, seq_len: int) -> dict[str, Any]:
    """All figures of the page."""
    model = load_model(MODEL)
    tokenizer = load_tokenizer(MODEL)
    geometry = describe(model.config)
    clusters = calibrate(
        model, CALIBRATION, keep=f"budget:{BUDGETS[0]}", measure="kl", probe_tokens=DAMAGE_PROBE,
        tokenizer=tokenizer,
    )  # fmt: skip
    allocations = {
        share: {
            "error": Budget(share).choose(clusters.error_curves, geometry),
            "kl": spend(Budget(share), clusters.kl_curves, clusters.error_curves, geometry),
        }
        for share in BUDGETS
    }

    def run(
        keep: list[tuple[int, ...]], methods: Sequence[str], probes: tuple[int, ...], windows: int = windows
    ) -> Comparison:
        rules = [",".join(map(str, kept)) for kept in dict.fromkeys(keep)]
        return compare(
            model, HELDOUT, calibration=CALIBRATION, keep=rules, methods=methods, probe_tokens=probes,
            windows=windows, seq_len=seq_len, tokenizer=tokenizer,
        )  # fmt: skip

    measured = [allocations[share]["kl"] for share in METHOD_BUDGETS]
    both = [kept for pair in allocations.values() for kept in pair.values()]
    tradeoff = run(both, ["chai"], METHOD_PROBES)
    methods = run(measured, list(METHODS), METHOD_PROBES)
    probes = run(measured, ["chai"], PROBES)
    paired = run(measured, PAIRED_METHODS, (MEASURED_PROBE_TOKENS,), PAIRED_WINDOWS)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {"processor": _processor(), "architecture": platform.machine(), "threads": 1},
        "versions": {
            name: version(name) for name in ("chai-export", "torch", "transformers", "scikit-learn")
        },
        "model": "pydoc-5m",
        "windows": windows,
        "seq_len": seq_len,
        "tokens": tradeoff.tokens,
        "nll_all": tradeoff.nll_all,
        "perplexity_all": math.exp(tradeoff.nll_all),
        "allocation_probe_tokens": DAMAGE_PROBE,
        "error_curves": clusters.error_curves,
        "kl_curves": clusters.kl_curves,
        "allocations": [
            {
                "budget": share,
                "measure": by,
                "kept_heads": kept,
                "kv_bytes_saved": geometry.kv_bytes_saved(kept),
                "predicted_kl": predicted(clusters.kl_curves, kept),
            }
            for share, pair in allocations.items()
            for by, kept in pair.items()
        ],
        "tradeoff": _rows(tradeoff),
        "methods": _rows(methods),
        "probes": _rows(probes),
        "paired": _paired(paired),
    }


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = comparison.to_json()["results"]
    return [{name: value for name, value in row.items() if name != "nll_change_by_window"} for row in rows]


def _paired(comparison: Comparison) -> dict[str, Any]:
    """The first method against each other one on the same windows: the mean difference and its error."""
    first = {row.kept_heads: row for row in comparison.results if row.method == PAIRED_METHODS[0]}
    rows = []
    for row, shown in zip(comparison.results, _rows(comparison), strict=True):
        ours, theirs = first[row.kept_heads].nll_change_by_window, row.nll_change_by_window
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        rows.append({**shown, "difference": statistics.fmean(differences), "difference_error": error})
    return {"windows": comparison.windows, "tokens": comparison.tokens, "results": rows}


def _processor() -> str:
    """The processor's name; nothing that identifies the machine."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


if __name__ == "__main__":
    main()
