"""Tiny bundles, and what the Python runner generates from them, for bundle_test.cpp and session_test.cpp.

    python plugins/tests/runner/fixture.py DIRECTORY      (in the root of the source tree)

Ends with 77, which ctest takes for "skipped", where chai_export cannot be imported.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

SKIPPED = 77
LONG = list(range(4, 33))
MIXED = [[5, 9], [7, 8, 20, 21, 6, 30], LONG, [3], [11, 12, 13, 14, 15]]


def onnxruntime_library() -> Path:
    """libonnxruntime.so of the installed Python package."""
    import onnxruntime

    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


def make(directory: Path) -> None:
    """Write the bundles and cases.json into ``directory``, replacing what is there."""
    import chai_export as ce
    from chai_export.bundle.bundle import Bundle
    from chai_export.runtime.pages import PAGE_LENGTH
    from tests.helpers.tiny_graph import TinyModel

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model = TinyModel(positions=400)
    grouped = TinyModel(heads=6, kv_heads=3, kept=(1, 2), head_dim=4, value_dim=8, positions=100)
    model.write(directory / "mha")
    model.write(directory / "eos", eos=[1, 15, 31])
    grouped.write(directory / "gqa")
    TinyModel(dtype="float16").write(directory / "half")
    TinyModel(positions=400, bits=(8, 4)).write(directory / "8-4", eos=[15, 31])
    shared = TinyModel(
        heads=6, kv_heads=3, kept=(2, 1, 2), sources=(0, 1, 0), bits=((4, 8), (16, 4), (0, 0)), positions=100
    )
    shared.write(directory / "mixed")
    TinyModel(dtype="float16", bits=((8, 0), (0, 4))).write(directory / "half-mixed")

    def case(
        bundle: str,
        prompts: list[list[int]],
        tokens: int,
        heads: str = "chai",
        batch: int = 8,
        seq: int = 0,
        memory: int = 0,
    ) -> dict[str, Any]:
        runner = ce.load(directory / bundle, heads=heads, max_batch=batch, cache_memory=memory or None)
        results = runner.generate(prompts, tokens, max_seq=seq or None)
        return {
            "bundle": bundle,
            "heads": heads,
            "max_batch": batch,
            "max_new_tokens": tokens,
            "max_seq": seq,
            "cache_memory": memory,
            "prompts": prompts,
            "results": [{"token_ids": r.token_ids, "stop_reason": r.stop_reason} for r in results],
        }

    def pages(count: int) -> int:
        """Bytes of pages of the bundle "mha"; the function body has two buffers of each."""
        return count * PAGE_LENGTH * Bundle.load(directory / "mha").manifest.kv_bytes_per_token()

    cases = [
        case("mha", [LONG], 64),
        case("mha", MIXED, 150),  # more than a page
        case("mha", MIXED, 20, batch=2),  # rows are reused
        case("mha", MIXED, 20, heads="all"),
        case("mha", [LONG, [5, 9]], 64, seq=40),
        case("eos", MIXED, 64),
        case("gqa", MIXED, 200),  # ends at the last learned position
        case("half", [LONG, [5, 9]], 8),
        case("mha", [LONG * 6, [5, 9], *MIXED], 20),  # a chunk of prompt beside rows that decode
        case("mha", MIXED, 150, memory=pages(5)),  # rows wait: of each two pages, five or two fit
        case("8-4", MIXED, 150),
        case("8-4", MIXED, 20, heads="all"),
        case("mixed", MIXED, 200),  # ends at the last learned position
        case("half-mixed", [LONG, [5, 9]], 8),
    ]
    # The last file: a fixture without it is not whole.
    content = {
        "onnxruntime_library": str(onnxruntime_library()),
        "page_length": PAGE_LENGTH,
        "cases": cases,
    }
    (directory / "cases.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    # The function body gives the expected tokens, whatever libraries this Python has.
    os.environ["CHAI_EXPORT_NATIVE"] = "0"
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    try:
        make(Path(sys.argv[1]))
    except ImportError as error:
        print(f"skipped: {error}")
        sys.exit(SKIPPED)
