"""Time to the first token and per token of a random Llama of 370 M parameters, by clusters and bits of cache.

Writes benchmarks/results/generate-<name>.json. The model has 24 layers of 16 heads (multi-head attention) in
float32; speed does not depend on what the weights are. onnxruntime-genai takes part where it is installed.
Caches are exact or have bits of keys and values; those are measured beside the exact cache with all heads,
and beside onnxruntime-genai's int8 cache.

Run it on a machine that does nothing else: python benchmarks/generate.py NAME [--work DIR]
It takes an hour and a half; what the result file has already is not measured again, so that it may be
interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from itertools import product
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chai_export.bench.generate import bench_generate
from chai_export.clustering.clusters import Clusters
from chai_export.exporter.stage import export

REPOSITORY = Path(__file__).parents[1]
LAYERS, HEADS = 24, 16
EXACT = "exact"
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


def measure(work: Path, arguments: argparse.Namespace, path: Path) -> None:
    model = work / "model"
    if not model.exists():
        make_model(model, arguments.layers, arguments.hidden)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {(r["pattern"], r["prompt_tokens"], r.get("cache", EXACT)) for r in results}
    for name, length, cache in product(PATTERNS, arguments.lengths, arguments.caches):
        if (name, length, cache) in done:
            continue
        result = bench_generate(
            make_bundle(work, name, cache, arguments.layers),
            prompt_tokens=length,
            new_tokens=arguments.new_tokens,
            rounds=arguments.rounds if length <= 4096 else 1,
            model=model,
            against=None if cache == EXACT else make_bundle(work, name, EXACT, arguments.layers),
            threads=arguments.threads,
        )
        against = None if cache == EXACT else EXACT
        results.append({"pattern": name, "cache": cache, **result, "bundle": name, "against": against})
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(results[-1]), flush=True)


def make_bundle(work: Path, name: str, cache: str, layers: int) -> Path:
    """The bundle of a pattern and a cache, made once; a model of fewer layers takes the pattern's ends."""
    kept = PATTERNS[name]
    bundle = work / f"{name}-{cache.replace('/', '-')}"
    if not bundle.exists():
        clusters = work / f"{name}.json"
        pattern = kept[: layers // 2] + kept[LAYERS - layers + layers // 2 :]
        clusters.write_text(json.dumps({"format": "chai-clusters/1", "kept_heads": pattern}))
        keys, values = (None, None) if cache == EXACT else map(int, cache.split("/"))
        export(work / "model", Clusters.load(clusters), bundle, key_bits=keys, value_bits=values)
    return bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the machine, such as milan-2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument(
        "--caches", nargs="+", default=[EXACT, "8/8", "8/4"], help="exact, or bits of keys/values"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="prompts timed, up to 4096 tokens; beyond, one")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--work", type=Path, help="keep model and bundles here (default: a temporary directory)"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, to try the script")
    parser.add_argument("--hidden", type=int, default=1024, help="smaller, to try the script")
    arguments = parser.parse_args()
    path = REPOSITORY / "benchmarks" / "results" / f"generate-{arguments.name}.json"
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        measure(work, arguments, path)
    print(path)


if __name__ == "__main__":
    main()
