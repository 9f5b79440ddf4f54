"""What CHAI costs the demo model on held-out text, at several settings of `--keep`.

    python benchmarks/demo_quality.py            # writes results/demo_quality.json, about five minutes

Each setting is calibrated, exported, verified against the Hugging Face model and evaluated on all of
examples/text/heldout.txt through the runner, so the figures are those of the bundle that a user runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from chai_export.bench import machine
from chai_export.bench.memory import bench_memory
from chai_export.clustering.calibrate import calibrate
from chai_export.exporter.stage import export
from chai_export.op.probe import MEASURED_PROBE_TOKENS
from chai_export.quality.evaluate import evaluate
from chai_export.quality.verify import verify

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "pydoc-5m"
TEXT = ROOT / "examples" / "text"
RULES = ("budget:0.1", "budget:0.214", "elbow", "budget:0.25", "budget:0.3")
WINDOW = 300
PROMPT = 1016
"""Tokens; `bench memory` makes 8 more, so the caches hold 1023 (the last one made is not fed)."""


def measure(rule: str, folder: Path, max_tokens: int | None) -> dict[str, Any]:
    """One setting, from calibration to figures."""
    bundle = folder / rule.replace(":", "-")
    clusters = calibrate(MODEL, TEXT / "calibration.txt", keep=rule)
    export(MODEL, clusters, bundle)
    gate = verify(bundle, MODEL, text=TEXT / "heldout.txt")
    figures = evaluate(bundle, TEXT / "heldout.txt", window=WINDOW, max_tokens=max_tokens)
    memory = bench_memory(bundle, prompt_tokens=PROMPT)["heads"]
    return {
        "keep": rule,
        "kept_heads": list(clusters.kept_heads),
        "kv_bytes_saved": clusters.kv_bytes_saved,
        "added_nats_per_token": figures["chai"]["nll"] - figures["all"]["nll"],
        "perplexity_ratio": figures["chai"]["perplexity"] / figures["all"]["perplexity"],
        "kv_cache_bytes": {heads: memory[heads]["kv_cache_bytes"] for heads in ("all", "chai")},
        "eval": figures,
        "verify": gate.to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/demo_quality.json")
    parser.add_argument("--max-tokens", type=int, help="of the held-out text (default: all of it)")
    parser.add_argument(
        "--keep", action="append", help=f"a rule; may be repeated (default: {', '.join(RULES)})"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rules = arguments.keep or RULES
        results = [measure(rule, Path(folder), arguments.max_tokens) for rule in rules]
    report = {
        "command": "python benchmarks/demo_quality.py",
        "model": f"examples/pydoc-5m, float32, probe of {MEASURED_PROBE_TOKENS} tokens",
        "text": f"examples/text/heldout.txt in windows of {WINDOW} tokens",
        "backend": "onnxruntime",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine.describe(),
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for result in results:
        print(
            f"{result['keep']:>14}  {result['kv_bytes_saved']:6.1%} saved  "
            f"perplexity x {result['perplexity_ratio']:.4f}  KL {result['eval']['kl']:.4f}  "
            f"verified {result['verify']['ok']}  {result['kept_heads']}"
        )


if __name__ == "__main__":
    main()
