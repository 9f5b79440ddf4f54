"""Compilation ahead of time without a GPU: forms, architectures, a complete index, equal bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chai_export
from chai_export.errors import ChaiError
from chai_export.kernels import compile
from chai_export.kernels.blocks import architectures
from chai_export.kernels.formula import evaluate
from chai_export.kernels.launches import tensor_types
from chai_export.kernels.spec import Spec

triton = pytest.importorskip("triton")

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-kernel-resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# KiB of shared memory per block, CUDA programming guide.
SHARED_LIMIT = {
    75: 64,
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    110: 227,
    120: 99,
    121: 99,
}
SMALL = Spec(4, 2, 32, 32, "float16", key_bits=8, value_bits=4, softcap=True, sinks=True)
FORMS = {
    "float16_8_4_terms": SMALL,
    "bfloat16_8_8": Spec(32, 32, 128, 128, "bfloat16", key_bits=8, value_bits=8),
    "float32_4_4_slopes": Spec(8, 2, 128, 128, "float32", key_bits=4, value_bits=4, slopes=True),
    "float16_as_given": Spec(32, 8, 64, 64, "float16"),
    "bfloat16_16_256": Spec(16, 4, 256, 256, "bfloat16", key_bits=16, value_bits=8),
}
ALL = [
    "probe_kernel",
    "head_map_kernel",
    "append_kernel",
    "prefill_kernel",
    "decode_scores_kernel",
    "decode_values_kernel",
]
SYMBOLS = {
    "B": 3, "S": 1, "R": 1, "C": 96, "N": 20, "L": 32, "online": 1, "window": 0, "H": 4, "G": 2, "D": 32,
    "Dv": 32, "P": 5,
}  # fmt: skip


def _load(index: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(index.read_text())
    return loaded


def _check(index_path: Path, arch: int, kernels: list[str]) -> dict[str, Any]:
    index = _load(index_path)
    assert index["format"] == "chai-kernels/2"
    assert [launch["kernel"] for launch in index["launches"]] == kernels
    for launch in index["launches"]:
        cubin = (index_path.parent / launch["file"]).read_bytes()
        assert cubin.startswith(b"\x7fELF")
        assert hashlib.sha256(cubin).hexdigest() == launch["sha256"]
        assert launch["target"].startswith(f"sm_{arch}")
        assert launch["shared_bytes"] <= SHARED_LIMIT[arch] * 1024
    return index


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile(SMALL, 90, tmp_path_factory.mktemp("sm_90"))


def test_all_kernels_compile_and_formulas_need_only_the_index_s_symbols(small: Path) -> None:
    index = _check(small, 90, ALL)
    assert set(index["symbols"]) == set(SYMBOLS)
    for launch in index["launches"]:
        assert evaluate(launch["when"], SYMBOLS) in (0, 1)
        assert all(1 <= evaluate(formula, SYMBOLS) < 65536 for formula in launch["grid"])
        for argument in launch["arguments"]:
            if argument["type"] == "int32":
                evaluate(argument["value"], SYMBOLS)
    for section in index["workspace"]:
        assert evaluate(section["count"], SYMBOLS) > 0


def test_kernels_ask_for_the_tensors_that_a_node_of_the_form_has(small: Path) -> None:
    index = _load(small)
    sections = {section["name"] for section in index["workspace"]}
    used = {argument.get("tensor") for launch in index["launches"] for argument in launch["arguments"]}
    assert used - {None} - sections == set(tensor_types(SMALL))
    assert "alibi_slopes" not in used
    assert {"key_scales", "value_scales", "sinks", "page_table"} <= used
    attributes = {
        a["attribute"] for launch in index["launches"] for a in launch["arguments"] if "attribute" in a
    }
    assert attributes == {"scale", "softcap"}


@pytest.mark.parametrize("arch", [75, 121])
def test_decode_compiles_for_the_oldest_and_the_newest_architecture(arch: int, tmp_path: Path) -> None:
    decode = ALL[-2:]
    _check(compile(SMALL, arch, tmp_path, only=decode), arch, decode)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiles_for_every_architecture(form: str, arch: int, tmp_path: Path) -> None:
    _check(compile(FORMS[form], arch, tmp_path), arch, ALL)


def test_every_architecture_is_compiled_here() -> None:
    assert architectures() == sorted(SHARED_LIMIT)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ChaiError, match="no GPU kernels for sm_70; choose one of 75, 80"):
        compile(SMALL, 70, tmp_path)


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton carries no cuobjdump")
def test_index_lists_the_parameters_that_the_cubin_has(small: Path) -> None:
    """Sizes of all parameters, hidden ones included, as the cubin itself declares them."""
    size = {"pointer": 8, "int32": 4, "float32": 4}
    for launch in _load(small)["launches"]:
        cubin = small.parent / launch["file"]
        dump = subprocess.run([CUOBJDUMP, "-elf", cubin], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"Ordinal\s*:\s*0x(\w+)\s+Offset\s*:\s*0x\w+\s+Size\s*:\s*0x(\w+)", dump)
        sizes = [int(bytes_, 16) for _, bytes_ in sorted(found, key=lambda pair: int(pair[0], 16))]
        assert sizes == [size[argument["type"]] for argument in launch["arguments"]], launch["kernel"]


def test_same_source_gives_the_same_bytes_in_another_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the package elsewhere, and settings of the caller that would change the code if used."""
    package = tmp_path / "elsewhere" / "chai_export"
    source = Path(chai_export.__file__).parent
    for part in ("__init__.py", "choice.py", "errors.py", "version.py", "kernels", "op"):
        copy = shutil.copytree if (source / part).is_dir() else shutil.copy
        package.mkdir(parents=True, exist_ok=True)
        copy(source / part, package / part)
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = (
        "import chai_export\nfrom chai_export.kernels import Spec, compile\n"
        f"compile({SMALL!r}, 90, 'out', only=['decode_scores_kernel', 'append_kernel'])\n"
        f"assert chai_export.__file__.startswith({str(tmp_path)!r})\n"
    )
    search = os.pathsep.join([str(package.parent), *sys.path])
    command = [sys.executable, "-S", "-c", program]  # -S: an editable install would bring its own copy
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": search}, check=True)
    first = {launch["kernel"]: launch for launch in _load(small)["launches"]}
    second = _load(tmp_path / "out" / "index.json")
    assert second["source_sha256"] == _load(small)["source_sha256"]
    assert len(second["launches"]) == 2
    for launch in second["launches"]:
        assert launch == first[launch["kernel"]]
        file = tmp_path / "out" / launch["file"]
        assert file.read_bytes() == (small.parent / launch["file"]).read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.parametrize("kernels", [ALL[:4], ALL[4:]], ids=["prefill", "decode"])
def test_registers_and_spills_are_as_recorded(kernels: list[str], tmp_path: Path) -> None:
    """With the recorded Triton the figures are equal; with another one, nothing of the small model spills."""
    record = json.loads(RECORD.read_text())
    _compare_with_record(
        _load(compile(_spec(record, "small"), 90, tmp_path, only=kernels)), record, "small", 90
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        (name, int(arch.removeprefix("sm_")))
        for name, figures in json.loads(RECORD.read_text())["figures"].items()
        for arch in figures
    ],
)
def test_larger_models_compile_and_keep_their_registers(name: str, arch: int, tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text())
    index = _check(compile(_spec(record, name), arch, tmp_path), arch, ALL)
    _compare_with_record(index, record, name, arch)


def test_a_failing_compiler_leaves_no_files(tmp_path: Path) -> None:
    spec = Spec(4, 2, 32, 32, "float16")
    object.__setattr__(spec, "head_dim", 512)  # past the check here, so that the compiling process meets it
    with pytest.raises(ChaiError, match=r"kernels for sm_90 failed: .*head_dim up to 256, got 512; install"):
        compile(spec, 90, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_outside_the_limits_is_refused() -> None:
    with pytest.raises(ChaiError, match="up to 256, got 288"):
        Spec(4, 4, 288, 288, "float16")
    with pytest.raises(ChaiError, match="1 to 128 query heads, got 256"):
        Spec(256, 8, 64, 64, "float16")
    with pytest.raises(ChaiError, match="not a multiple of 3 KV heads"):
        Spec(4, 3, 64, 64, "float16")


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("S 64 cdiv", 3),
        ("B R * H +", 10),
        ("R G <", 1),
        ("S 1 ==", 0),
        ("8 C min", 8),
        ("8 C max", 96),
        ("7 2 -", 5),
    ],
)
def test_formulas_are_evaluated_left_to_right(formula: str, value: int) -> None:
    assert evaluate(formula, {**SYMBOLS, "S": 130, "B": 6}) == value


@pytest.mark.parametrize("formula", ["", "S S", "S +", "S X *"])
def test_a_broken_formula_is_an_error(formula: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        evaluate(formula, SYMBOLS)


def _spec(record: dict[str, Any], name: str) -> Spec:
    return Spec(**record["specs"][name])


def _compare_with_record(index: dict[str, Any], record: dict[str, Any], name: str, arch: int) -> None:
    recorded = record["figures"][name][f"sm_{arch}"]
    for launch in index["launches"]:
        figures = launch["resources"] | {"shared_bytes": launch["shared_bytes"]}
        if index["triton"] == record["triton"]:
            assert figures == recorded[launch["kernel"]], (
                f"{launch['kernel']} on sm_{arch}; if meant, record it"
            )
        elif not recorded[launch["kernel"]]["spill_store_bytes"]:
            assert figures["spill_store_bytes"] == 0, f"{launch['kernel']} spills on sm_{arch}"
