"""Version 2's kernels compiled ahead of time without a GPU: forms, architectures, a complete index."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from chai_export.errors import ChaiError
from chai_export.kernels import compile
from chai_export.kernels.blocks import architectures
from chai_export.kernels.formula import evaluate
from chai_export.kernels.v2.program import tensor_types
from chai_export.kernels.v2.spec import Spec

pytest.importorskip("triton")

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
