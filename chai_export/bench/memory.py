"""``chai-export bench memory``: bytes of cache and peak resident size, each mode in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from chai_export.arguments import require_at_least_one
from chai_export.bench import machine
from chai_export.bench.cache_facts import cache_facts
from chai_export.bundle.bundle import Bundle
from chai_export.bundle.choices import Heads
from chai_export.errors import ChaiError, last_line

MODES = tuple(Heads)


def bench_memory(bundle: str | Path, *, prompt_tokens: int = 1024, new_tokens: int = 8) -> dict[str, Any]:
    """Run a prompt with CHAI and with all heads, and report what each needed.

    Args:
        bundle: what to measure.
        prompt_tokens: length of the prompt, of random tokens.
        new_tokens: tokens made after it.

    Raises:
        UsageError: a length is out of range.
        ChaiError: the bundle is not valid or a run fails.
    """
    require_at_least_one(prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    manifest = Bundle.load(bundle).manifest
    return {
        "machine": machine.describe(),
        "bundle": str(bundle),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        **cache_facts(manifest),
        "heads": {mode: _in_own_process(bundle, mode, prompt_tokens, new_tokens) for mode in MODES},
    }


def _in_own_process(bundle: str | Path, mode: str, prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    words = [sys.executable, "-m", __name__, str(bundle), mode, str(prompt_tokens), str(new_tokens)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = last_line(done.stderr, f"exit status {done.returncode}")
        raise ChaiError(f"the run with heads={mode} failed ({reason}); try a shorter --prompt-tokens")
    result: dict[str, int] = json.loads(done.stdout)
    return result


def _run(bundle: str, mode: str, prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """What the process of one mode prints: bytes of caches in use, and the most that was resident."""
    from chai_export.runtime.runner import load

    runner = load(bundle, heads=mode, max_batch=1)
    vocabulary = runner.bundle.manifest.vocab_size
    prompt = np.random.default_rng(0).integers(0, vocabulary, prompt_tokens).tolist()
    loaded = _peak_resident()
    runner.generate([prompt], max_new_tokens=new_tokens, ignore_eos=True)
    return {
        "kv_cache_bytes": runner.kv_cache_bytes,
        "peak_resident_bytes": _peak_resident(),
        "peak_resident_bytes_when_loaded": loaded,
    }


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
