"""How far right computations of one model differ in a logit, and how far wrong ones do.

Writes benchmarks/results/logit_noise.json and the tables of docs/verification.md. Every model is computed
again in another way (torch in the dtype itself, float64, the bundle on ONNX Runtime with the native library
and without), and each difference is put beside what `verify` allows at that position. Then single things of
the models are made wrong, and the same is done.

    python benchmarks/logit_noise.py                          # the demo, tiny families, random Llamas
    python benchmarks/logit_noise.py --model SmolLM2=DIR      # and a real model, a Hugging Face directory
    python benchmarks/logit_noise.py --tables                 # the page again from the results

Bundles are kept in --work, since exporting a deep model takes minutes; a model measured before is not
measured again unless its name is given with --again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import logit_noise_page
import numpy as np
import torch
from logit_noise_mistakes import MISTAKES, mistaken_maps
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import chai_export as ce
from chai_export.bench.machine import describe
from chai_export.bundle.atomic import atomic_file
from chai_export.clustering.clusters import Clusters
from chai_export.errors import ChaiError
from chai_export.models.kv_sources import describe_model
from chai_export.models.loading import load_model
from chai_export.models.logits import differences
from chai_export.models.oracle import Oracle, model_logits
from chai_export.models.text import read_tokens
from chai_export.models.tokenizer import load_tokenizer
from chai_export.progress import note
from chai_export.quality.rounding import rounding, tolerances
from chai_export.runtime.native import SWITCH

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "logit_noise.json"
TEXT = ROOT / "examples" / "text" / "heldout.txt"
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

Logits = NDArray[np.float32]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="a model of yours")
    parser.add_argument("--again", action="append", default=[], metavar="NAME", help="measure it again")
    parser.add_argument("--work", type=Path, help="where bundles are kept (default: a temporary directory)")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text("utf-8")) if arguments.output.is_file() else {}
    if not arguments.tables:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as scratch:
            work = arguments.work or Path(scratch)
            for name, make in models([item.split("=", 1) for item in arguments.model]).items():
                if name in results.get("models", {}) and name not in arguments.again:
                    continue
                note(f"measuring {name}")
                results.setdefault("models", {})[name] = measure(name, make(), work)
                results["machine"] = describe()
                with atomic_file(arguments.output) as partial:
                    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    logit_noise_page.write(ROOT / "docs" / "verification.md", results)


def models(named: list[list[str]]) -> dict[str, Callable[[], PreTrainedModel]]:
    """What is measured, by name."""
    found: dict[str, Callable[[], PreTrainedModel]] = {
        "pydoc-5m": lambda: load_model(ROOT / "examples" / "pydoc-5m")
    }
    for kind in ("gpt2", "falcon", "gemma", "olmo2"):
        found[f"tiny {kind}"] = lambda kind=kind: random_model(kind, 2, 64)  # type: ignore[misc]
    for layers, width in ((2, 64), (8, 64), (32, 64), (2, 512), (8, 512), (32, 256)):
        found[f"random Llama {layers}×{width}"] = lambda size=(layers, width): random_model("llama", *size)  # type: ignore[misc]
    for name, directory in named:
        found[name] = lambda directory=directory: load_model(directory)  # type: ignore[misc]
    return found


def random_model(kind: str, layers: int, width: int) -> PreTrainedModel:
    """Weights that keep the size of what passes through, so that attention is far from uniform."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8, "vocab_size": 1000}
    options = {
        "gpt2": {"n_embd": width, "n_layer": layers, "n_head": 8, "vocab_size": 1000},
        "falcon": {**sizes, "num_kv_heads": 2, "new_decoder_architecture": True},
        "gemma": {**sizes, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 2 * width},
        "olmo2": {**sizes, "num_key_value_heads": 4, "intermediate_size": 2 * width},
        "llama": {**sizes, "num_key_value_heads": 4, "intermediate_size": 3 * width},
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **options, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model


def measure(name: str, model: PreTrainedModel, work: Path) -> Row:
    """All rows of one model."""
    geometry = describe_model(model)
    half = [max(1, geometry.num_kv_heads // 2 + layer % 2) for layer in range(geometry.num_layers)]
    kept = [min(count, geometry.num_kv_heads) for count in half]
    sequences = token_sequences(model)
    plain = [model_logits(model, ids) for ids in sequences]
    engines = not name.startswith("random")  # tracing takes seconds for each layer
    row: Row = {
        "layers": geometry.num_layers,
        "hidden": int(model.config.hidden_size),
        "tokens": sum(map(len, sequences)),
        "largest_logit": max(float(np.abs(x).max()) for x in plain),
        "spread": float(np.sqrt(np.mean([x.var(axis=-1).mean() for x in plain]))),
        "right": [],
        "wrong": [],
    }
    for dtype in EPSILON:
        rounded = copy.deepcopy(model).to(getattr(torch, dtype))
        reference = copy.deepcopy(rounded).float()
        truth = Judge(reference, dtype, sequences, kept)
        row["right"].append(truth.row("torch", "all", torch_logits(rounded, dtype, sequences)))
        if dtype != "bfloat16" and engines:
            for native in (True, False):
                path = bundle_of(name, model, dtype, kept, work)
                try:
                    row["right"].extend(truth.engine(path, heads, native=native) for heads in ("all", "chai"))
                except ChaiError as error:  # not every family exports to float16
                    note(f"{name} in {dtype}: {error}")
        for mistake, make in MISTAKES.items():
            wrong = copy.deepcopy(reference)
            with torch.no_grad():
                if not make(wrong):
                    continue
            found = truth.row(mistake, "all", [model_logits(wrong, ids) for ids in sequences])
            row["wrong"].append(found)
        row["wrong"].extend(wrong_maps(truth, reference, kept, sequences))
    return row


class Judge:
    """The reference's logits with what is allowed at each position, once for each way of running."""

    def __init__(
        self, model: PreTrainedModel, dtype: str, sequences: list[list[int]], kept: list[int]
    ) -> None:
        self._model, self._dtype, self._sequences = model, dtype, sequences
        self.oracle = Oracle(model, kept)
        self._all = [self._judged(lambda ids=ids: model_logits(model, ids)) for ids in sequences]  # type: ignore[misc]

    def _judged(self, run: Callable[[], Logits]) -> tuple[Logits, NDArray[np.float64]]:
        plain = run()
        with rounding(self._model, self._dtype):
            return plain, tolerances(plain, run())

    def row(self, what: str, heads: str, found: list[Logits], maps: list[Any] | None = None) -> Row:
        """Differences of one other computation."""
        expected = self._all if maps is None else [*self._under(maps)]
        moved = [differences(a, b[0]) for a, b in zip(found, expected, strict=True)]
        used = [a / b[1] for a, b in zip(moved, expected, strict=True)]
        spread = [b[0].std(axis=-1) for b in expected]
        unit = EPSILON[self._dtype] * np.sqrt(self._model.config.num_hidden_layers)
        formula = np.concatenate([a / (unit * b) for a, b in zip(moved, spread, strict=True)])
        return {
            "what": what,
            "dtype": self._dtype,
            "heads": heads,
            "largest_difference": float(np.concatenate(moved).max()),
            "median_difference": float(np.median(np.concatenate(moved))),
            "median_tolerance": float(np.median(np.concatenate([b[1] for b in expected]))),
            "largest_tolerance": float(np.concatenate([b[1] for b in expected]).max()),
            "tolerance_used": float(np.concatenate(used).max()),
            "formula_constant": float(formula.max()),
            "formula_constant_median": float(np.median(formula)),
        }

    def engine(self, path: Path, heads: str, *, native: bool) -> Row:
        """A bundle on ONNX Runtime's CPU provider."""
        os.environ[SWITCH] = "1" if native else "0"
        runner = ce.load(path, heads=heads, threads=1)
        found, maps = [], []
        for ids in self._sequences:
            found.append(runner.logits(ids))
            maps.append(runner.head_maps[:, 0])
        what = f"ONNX Runtime, {'native library' if native else 'function body'}"
        return self.row(what, heads, found, maps if heads == "chai" else None)

    def _under(self, maps: list[Any]) -> Iterator[tuple[Logits, NDArray[np.float64]]]:
        for ids, given in zip(self._sequences, maps, strict=True):
            yield self._judged(lambda ids=ids, given=given: self.oracle.logits(ids, given))  # type: ignore[misc]


def wrong_maps(
    truth: Judge, model: PreTrainedModel, kept: list[int], sequences: list[list[int]]
) -> Iterator[Row]:
    """Mistakes of CHAI itself: what is computed does not follow the head maps that are reported."""
    maps = []
    for ids in sequences:
        truth.oracle.logits(ids)
        maps.append(truth.oracle.head_maps[:, 0].copy())
    for what, run in mistaken_maps(model, kept).items():
        found = [run(ids, given) for ids, given in zip(sequences, maps, strict=True)]
        if all(logits is not None for logits in found):
            yield truth.row(what, "chai", [x for x in found if x is not None], maps)


def token_sequences(model: PreTrainedModel) -> list[list[int]]:
    """Three random ones, and a text where there is a tokenizer."""
    generator = np.random.default_rng(0)
    found = [generator.integers(3, model.config.vocab_size, 64).tolist() for _ in range(3)]
    source = str(model.config.name_or_path)
    if source and Path(source).is_dir():
        found.append(read_tokens(TEXT, load_tokenizer(source), 64).tolist())
    return found


def torch_logits(model: PreTrainedModel, dtype: str, sequences: list[list[int]]) -> list[Logits]:
    """The model in its dtype; float32 in float64, which is as far away as another float32."""
    other = model.double() if dtype == "float32" else model
    return [model_logits(other, ids) for ids in sequences]


def bundle_of(name: str, model: PreTrainedModel, dtype: str, kept: list[int], work: Path) -> Path:
    path = work / f"{name.replace(' ', '-')}-{dtype}"
    if not (path / "manifest.json").is_file():
        ce.export(model, Clusters(tuple(kept)), path, dtype=dtype, probe_tokens=5)
    return path


if __name__ == "__main__":
    main()
