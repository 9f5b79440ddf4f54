"""Time and memory of exporting a large random Llama; the model has 1.1 B parameters unless told otherwise.

Two processes, so that making the model does not count: one writes it to disk, the other exports it while its
resident memory is sampled. Claims: peak resident size < 2.2 x the float32 weights, rewrite < 60 s.

    python benchmarks/large_export.py                       # 1.1 B parameters: 14 GB of disk, 10 GB of memory
    python benchmarks/large_export.py --hidden 512 --layers 4 --output /tmp/small.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULT = Path(__file__).parent / "results" / "large_export.json"
MEMORY_CLAIM = 2.2
REWRITE_CLAIM_S = 60.0


def make_model(directory: Path, hidden: int, layers: int) -> int:
    """Write a random Llama in float32; return the bytes of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory, max_shard_size="2GB")
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class PeakMemory:
    """Largest resident size of this process, sampled; ``anonymous`` leaves out pages of mapped files."""

    def __init__(self) -> None:
        self.resident = self.anonymous = 0
        self._process = psutil.Process()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            memory = self._process.memory_info()
            self.resident = max(self.resident, memory.rss)
            self.anonymous = max(self.anonymous, memory.rss - memory.shared)
            time.sleep(0.02)


def export_model(source: Path, output: Path, layers: int) -> dict[str, Any]:
    """Export with half of the heads kept and time the stages."""
    from chai_export.bundle import write
    from chai_export.clustering.clusters import Clusters
    from chai_export.exporter import stage, torch_export
    from chai_export.graph import pipeline

    seconds: dict[str, float] = {}

    def timed(module: Any, name: str) -> None:
        function = getattr(module, name)

        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds[name] = time.perf_counter() - start
            return result

        setattr(module, name, run)

    timed(torch_export, "export_onnx")
    timed(pipeline, "rewrite_model")
    timed(write, "write_bundle")
    peak = PeakMemory()
    start = time.perf_counter()
    bundle = stage.export(source, Clusters((16,) * layers), output)
    proof = bundle.manifest.proof
    return {
        "seconds": {
            "whole export": round(time.perf_counter() - start, 1),
            "torch.onnx.export": round(seconds["export_onnx"], 1),
            "rewrite, proof and hashes": round(seconds["rewrite_model"] + seconds["write_bundle"], 1),
        },
        "peak_resident_bytes": peak.resident,
        "peak_anonymous_bytes": peak.anonymous,
        "proof": None if proof is None else proof.model_dump(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores and memory; nothing that names the machine."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {"processor": model, "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument(
        "--work", type=Path, help="directory for the model and the bundle (default: temporary)"
    )
    parser.add_argument("--step", choices=["make", "export"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "make":
        print(make_model(arguments.work / "model", arguments.hidden, arguments.layers))
        return 0
    if arguments.step == "export":
        print(json.dumps(export_model(arguments.work / "model", arguments.work / "bundle", arguments.layers)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        common = ["--hidden", str(arguments.hidden), "--layers", str(arguments.layers), "--work", work]

        def step(name: str) -> str:
            command = [sys.executable, __file__, *common, "--step", name]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            return result.stdout.strip().splitlines()[-1]

        weights = int(step("make"))
        measured = json.loads(step("export"))
    ratio = measured["peak_resident_bytes"] / weights
    rewrite = measured["seconds"]["rewrite, proof and hashes"]
    result = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnx-ir", "onnxruntime")},
        "model": {
            "family": "llama",
            "hidden_size": arguments.hidden,
            "layers": arguments.layers,
            "heads": 32,
        },
        "weight_bytes_float32": weights,
        **measured,
        "peak_resident_over_weights": round(ratio, 3),
        "claims": {
            f"peak resident size < {MEMORY_CLAIM} x the float32 weights": ratio < MEMORY_CLAIM,
            f"rewrite < {REWRITE_CLAIM_S:.0f} s": rewrite < REWRITE_CLAIM_S,
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if all(result["claims"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
