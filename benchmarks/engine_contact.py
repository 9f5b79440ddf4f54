"""A GPU back end from build to text: the demo model, token by token as ONNX Runtime's CPU provider has it.

    python benchmarks/engine_contact.py tensorrt --dtype float32
    python benchmarks/engine_contact.py onnxruntime --bundle ./bundle

Builds (which proves the engine), generates in company so that rows come, go and grow over several pages while
decode steps are captured and replayed, and compares. The last line of output is a JSON object: what was
found, or "skipped" with what the machine lacks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chai_export as ce
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Backend, Heads
from chai_export.engines.build import build
from chai_export.errors import ChaiError
from chai_export.runtime.onnxruntime_session import OnnxRuntimeSession
from chai_export.runtime.pages import PAGE_LENGTH
from chai_export.runtime.runner import Runner

MODEL = Path(__file__).resolve().parent.parent / "examples" / "pydoc-5m"
NEW_TOKENS = 2 * PAGE_LENGTH + 20
"""So that every row begins a third page."""
ROWS = 3
KEPT = (16, 16, 8, 5, 5, 4)
"""Heads of the demo model that keep keys, as `--keep budget:0.214` chooses them."""
UNDECIDED = {"float32": 1e-3, "float16": 5e-2}
"""By dtype: where the two likeliest tokens of the reference are no further apart, either is right."""


def require(backend: Backend) -> None:
    """Raise unless this machine has what the back end needs.

    Raises:
        ChaiError: something is missing; says how to get it.
    """
    if backend is Backend.ONNXRUNTIME:
        from chai_export.runtime.onnxruntime_gpu import require_cuda_gpu, require_provider

        require_cuda_gpu()
        require_provider()
        return
    from chai_export.runtime.tensorrt_environment import (
        import_polygraphy,
        import_tensorrt,
        require_gpu,
        require_plugin,
    )

    tensorrt = import_tensorrt()
    import_polygraphy()
    require_gpu()
    require_plugin(tensorrt)


def contact(path: Path, backend: Backend, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, Any]:
    """Build, run and compare; what was found.

    Raises:
        ChaiError: the back end does not build or run here.
        AssertionError: it computes something else.
    """
    longest = max(map(len, prompts)) + new_tokens
    gpu = "here" if backend is Backend.ONNXRUNTIME else None
    record = build(path, backend, max_batch=ROWS, max_seq=longest, gpu=gpu)
    bundle = Bundle.load(path)
    found: dict[str, Any] = {
        "backend": str(backend), "dtype": str(bundle.manifest.dtype), "runtime": record.runtime_version,
        "gpu": record.gpu_architecture or record.settings.get("gpu_architectures"),
    }  # fmt: skip
    for heads in (Heads.CHAI, Heads.ALL):
        runner = ce.load(path, backend=backend, heads=heads, max_batch=ROWS)
        reference = Runner(bundle, OnnxRuntimeSession(bundle, heads), Backend.ONNXRUNTIME, heads, ROWS)
        assert type(runner.session) is not OnnxRuntimeSession, "it runs on the CPU"
        results = runner.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        wanted = reference.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        pages = max(runner.session.held_tokens.values()) // runner.session.page_length
        found[f"{heads} heads"] = {
            "tokens": sum(len(result.token_ids) for result in results),
            "same_tokens": sum(
                _same(bundle, reference, p, r.token_ids, w.token_ids)
                for p, r, w in zip(prompts, results, wanted, strict=True)
            ),
            "most_pages": pages,
            "ms_to_first_token": runner.timings.ttft_ms,
            "ms_per_token": runner.timings.tpot_ms,
        }
        again = runner.generate(prompts[:1], max_new_tokens=new_tokens, ignore_eos=True)
        assert again[0].token_ids == results[0].token_ids, "a text alone is not what it is in company"
    if backend is Backend.TENSORRT:
        found["layers_at_caches"] = layers_at_caches(bundle)
    return found


def _same(bundle: Bundle, reference: Runner, prompt: list[int], made: list[int], wanted: list[int]) -> int:
    """Tokens up to the first difference, which must be one that the reference was undecided about."""
    place = next((i for i, (a, b) in enumerate(zip(made, wanted, strict=True)) if a != b), len(made))
    if place < len(made):
        scores = reference.logits([*prompt, *wanted[:place]])[-1]
        apart = float(scores[wanted[place]] - scores[made[place]])
        allowed = UNDECIDED[bundle.manifest.dtype] * max(1.0, float(np.abs(scores).max()))
        assert apart <= allowed, (
            f"token {place} is {made[place]} and ONNX Runtime's {wanted[place]} is likelier by {apart:.3g}"
        )
    return place


def layers_at_caches(bundle: Bundle) -> list[str] | str:
    """Layers at the caches, and those that only change formats, as the engine's inspector names them."""
    from chai_export.runtime.tensorrt_environment import import_tensorrt
    from chai_export.runtime.tensorrt_session import load_engine

    tensorrt = import_tensorrt()
    plan = next(name for name in bundle.manifest.engines[Backend.TENSORRT].files if name.endswith(".plan"))
    engine = load_engine(tensorrt, (bundle.path / plan).read_bytes())
    try:
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON)
        layers = json.loads(text)["Layers"]
    except Exception as error:  # a version without, or one that says it otherwise
        return f"the inspector does not tell ({error})"
    names = [layer["Name"] if isinstance(layer, dict) else str(layer) for layer in layers]
    return [name for name in names if any(word in name.lower() for word in ("past_", "present_", "reformat"))]


def prompts_for(vocab: int) -> list[list[int]]:
    """More prompts than rows, shorter and longer than the probe and than a page."""
    random = np.random.default_rng(3)
    return [random.integers(4, vocab, size).tolist() for size in (2, 9, PAGE_LENGTH - 1, 40, PAGE_LENGTH + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", choices=Backend.words())
    parser.add_argument("--dtype", default="float32", help="of the demo model (default %(default)s)")
    parser.add_argument("--bundle", type=Path, help="in place of the demo model; its engine is built anew")
    arguments = parser.parse_args()
    backend = Backend(arguments.backend)
    try:
        require(backend)
    except ChaiError as error:
        print(json.dumps({"skipped": str(error)}))
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="chai-contact-") as folder:
            path = arguments.bundle
            if path is None:
                path = Path(folder) / "bundle"
                ce.export(MODEL, ce.Clusters(kept_heads=list(KEPT)), path, dtype=arguments.dtype)
            prompts = prompts_for(Bundle.load(path).manifest.vocab_size)
            found = contact(path, backend, prompts, NEW_TOKENS)
    except ChaiError as error:
        print(json.dumps({"failed": str(error)}))
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
