"""Plans beside published ways to make a KV cache smaller, at equal bytes, on the demo model or SmolLM2-135M.

    python benchmarks/scoreboard.py demo --plan plan.json
    python benchmarks/scoreboard.py smollm2 --seq-len 2048 --windows 1 --methods plan,bits,kivi,duo,h2o
    python benchmarks/quality_tradeoff.py --docs    # then writes docs/quality.md

Writes benchmarks/results/scoreboard-<model>-<tokens of a sequence>.json. Plans are chosen on
examples/text/calibration.txt and everything is measured on examples/text/heldout.txt, in torch. On two cores
the demo model takes about four minutes, SmolLM2 (benchmarks/smollm2_model.py) about twenty. With
``--greedy N`` the result also holds N tokens that a few of the methods write.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smollm2_model import write_model

from chai_export.bench import machine
from chai_export.bundle.atomic import atomic_file
from chai_export.clustering.calibrate import calibrate
from chai_export.clustering.plan import Plan
from chai_export.models.loading import load_model
from chai_export.models.tokenizer import load_tokenizer
from chai_export.quality.scoreboard.run import Scoreboard, greedy_texts, scoreboard

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ROOT / "examples" / "text" / "calibration.txt"
HELDOUT = ROOT / "examples" / "text" / "heldout.txt"
PROMPTS = (
    "The following example shows how to open a file and",
    "A class is a blueprint for objects. To define one,",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=("demo", "smollm2"))
    parser.add_argument("--folder", type=Path, help="of SmolLM2, kept there")
    parser.add_argument("--plan", type=Path, help="with measurements of the model (default: measured first)")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--methods")
    parser.add_argument("--greedy", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.model == "demo":
            folder = ROOT / "examples" / "pydoc-5m"
        else:
            folder = write_model(arguments.folder or Path(temporary) / "model")
        result = measure(folder, arguments)
    path = ROOT / "benchmarks" / "results" / f"scoreboard-{arguments.model}-{arguments.seq_len}.json"
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    if arguments.plan is None:
        plan = calibrate(model, CALIBRATION, bytes_share=0.4, force=True, tokenizer=tokenizer)
    else:
        plan = Plan.load(arguments.plan)
    board: Scoreboard = scoreboard(
        model,
        HELDOUT,
        calibration=CALIBRATION,
        plan=plan,
        wanted=arguments.methods.split(",") if arguments.methods else None,
        windows=arguments.windows,
        seq_len=arguments.seq_len,
        tokenizer=tokenizer,
    )
    texts = []
    if arguments.greedy:
        texts = greedy_texts(model, tokenizer, plan, PROMPTS, arguments.greedy, calibration=CALIBRATION)
    return {
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("chai-export", "torch", "transformers")},
        **board.to_json(),
        "model": arguments.model,
        "greedy": texts,
    }


if __name__ == "__main__":
    main()
