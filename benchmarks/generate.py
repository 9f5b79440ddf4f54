"""Time to the first token and per token of a random Llama of 370 M parameters, with two patterns of clusters.

Writes benchmarks/results/generate-<name>.json. The model has 24 layers of 16 heads (multi-head attention) in
float32; speed does not depend on what the weights are. onnxruntime-genai takes part where it is installed.

Run it on a machine that does nothing else: python benchmarks/generate.py NAME [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chai_export.bench.generate import bench_generate
from chai_export.clustering.clusters import Clusters
from chai_export.exporter.stage import export

REPOSITORY = Path(__file__).parents[1]
LAYERS, HEADS = 24, 16
# The paper's 7B model keeps all 32 heads in 18 of 32 layers and 4 in the others.
PATTERNS = {"paper_7b": [16] * 14 + [2] * 10, "quarter": [4] * LAYERS}


def make_model(directory: Path, layers: int, hidden: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for path in (REPOSITORY / "examples" / "pydoc-5m").glob("tokenizer*"):  # onnxruntime-genai wants one
        shutil.copy(path, directory)


def measure(work: Path, arguments: argparse.Namespace) -> list[dict[str, object]]:
    model = work / "model"
    if not model.exists():
        make_model(model, arguments.layers, arguments.hidden)
    results = []
    for name, kept in PATTERNS.items():
        bundle = work / name
        if not bundle.exists():
            clusters = work / f"{name}.json"
            pattern = (
                kept[: arguments.layers // 2] + kept[LAYERS - arguments.layers + arguments.layers // 2 :]
            )
            clusters.write_text(json.dumps({"format": "chai-clusters/1", "kept_heads": pattern}))
            export(model, Clusters.load(clusters), bundle)
        for length in arguments.lengths:
            result = bench_generate(
                bundle,
                prompt_tokens=length,
                new_tokens=arguments.new_tokens,
                rounds=arguments.rounds if length <= 4096 else 1,
                model=model,
                threads=arguments.threads,
            )
            results.append({"pattern": name, **result, "bundle": name})
            print(json.dumps(results[-1]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the machine, such as milan-2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="prompts timed, up to 4096 tokens; beyond, one")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--work", type=Path, help="keep model and bundles here (default: a temporary directory)"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script")
    parser.add_argument("--hidden", type=int, default=1024, help="smaller, to try the script")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        results = measure(work, arguments)
    path = REPOSITORY / "benchmarks" / "results" / f"generate-{arguments.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
