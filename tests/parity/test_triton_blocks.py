"""Block sizes are data: there is a rule for every supported model, and tuning can add one."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from chai_export.errors import ChaiError
from chai_export.kernels import Spec
from chai_export.kernels import blocks as blocks_module
from chai_export.kernels.blocks import BLOCKS_FILE, KernelBlocks, architectures, choose
from chai_export.kernels.launches import build_program
from chai_export.kernels.traffic import cache_bytes, call_traffic, count_pieces

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_tune


@pytest.mark.parametrize("arch", [*architectures(), "interpreter"])
def test_every_supported_model_has_block_sizes(arch: int | str) -> None:
    dims = (8, 32, 64, 80, 128, 160, 256)
    for dtype, dim, value_dim in itertools.product(("float32", "float16", "bfloat16"), dims, dims):
        program = build_program(
            Spec(8, 4, dim, value_dim, dtype), choose(Spec(8, 4, dim, value_dim, dtype), arch)
        )
        assert len(program.launches) == 6


def test_an_architecture_without_block_sizes_is_refused() -> None:
    with pytest.raises(ChaiError, match="no kernels for sm_70"):
        choose(Spec(8, 8, 64, 64, "float16"), 70)


def test_tuning_adds_a_rule_for_its_model_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, other = Spec(8, 8, 128, 128, "float32"), Spec(8, 8, 64, 64, "float32")
    before = choose(other, 90)
    file = tmp_path / "blocks.json"
    shutil.copy(BLOCKS_FILE, file)
    monkeypatch.setattr(gpu_tune, "BLOCKS_FILE", file)
    choice = gpu_tune.with_decode(choose(tuned, 90), KernelBlocks({"BLOCK_N": 128}, 2, 4), 77)
    gpu_tune.write(tuned, 90, choice)
    monkeypatch.setattr(blocks_module, "_file", lambda: json.loads(file.read_text()))
    assert choose(tuned, 90) == choice
    assert choose(other, 90).kernels == before.kernels
    assert choose(tuned, 80).kernels["decode_scores"].constants != {"BLOCK_N": 128}


def test_decode_moves_what_the_design_says_and_little_more() -> None:
    """(R·D + G·Dv)·T bytes of cache, plus scores and partial results of under two percent."""
    spec = Spec(32, 32, 128, 128, "bfloat16")
    program = build_program(spec, choose(spec, 90))
    traffic = call_traffic(
        program, gpu_tune.Shape(16, 1, 8, 8192, 16 * 64, 128), 8191, 1, [h // 4 * 4 for h in range(32)]
    )
    shape = gpu_tune.Shape(16, 1, 8, 8192, 16 * 64, 128)
    traffic = call_traffic(program, shape, 8191, 1, [h // 4 * 4 for h in range(32)])
    stored = cache_bytes(spec, shape, 8192)
    cache = 16 * (stored.keys + stored.values)
    assert cache == 16 * 2 * (8 + 32) * 128 * 8192
    assert cache < sum(kernel.bytes for kernel in traffic.values()) < 1.02 * cache


def test_prefill_counts_the_scores_of_every_piece() -> None:
    assert count_pieces([0] * 25 + list(range(25, 32)), 2) == 20
    assert count_pieces([h // 4 * 4 for h in range(32)], 4) == 8
    assert count_pieces(list(range(32)), 2) == 32
    spec = Spec(32, 32, 128, 128, "bfloat16")
    program = build_program(spec, choose(spec, 90))
    shape = gpu_tune.Shape(1, 10, 8, 10, 1, 10)
    flops = call_traffic(program, shape, 0, 10, [h // 4 * 4 for h in range(32)])["prefill_kernel"].flops
    assert flops == 2 * 55 * (16 + 32) * 128


def test_the_benchmark_needs_only_torch_triton_and_numpy() -> None:
    """It runs on machines where nothing of this project's other dependencies is installed."""
    missing = (
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "transformers",
        "ml_dtypes",
        "pydantic",
        "rich",
        "typer",
        "yaml",
    )
    program = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({missing!r}))\n"
        "sys.argv = ['gpu.py', '--model', 'sm_90']\n"
        "runpy.run_path('benchmarks/gpu.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| 25 and 7 single | 20 |" in done.stdout
