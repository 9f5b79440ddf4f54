"""Cubins on a real GPU, launched with nothing but the index and the CUDA driver, as a plugin would."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chai_export.op.attributes import Attributes
from chai_export.op.cases import CACHES, Case
from chai_export.op.dtypes import ELEMENT_TYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAX_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
ROWS = {
    "prefill": ((0, 70), (30, 9), (4, 0)),
    "decode": ((100, 1), (17, 1), (0, 1), (5, 0)),
}


@pytest.mark.parametrize("phase", list(ROWS))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cubins_launched_from_the_index_agree_with_the_reference(
    phase: str, dtype: str, tmp_path: Path
) -> None:
    from chai_export.kernels import Spec, compile
    from chai_export.kernels.case_runner import check_result, to_tensors
    from chai_export.kernels.launch import Result

    stored = Attributes(key_bits=8, value_bits=4)
    case = Case(
        f"cubin_{phase}", 16, 4, 2, ROWS[phase], head_dim=64, value_dim=96, page=32, capacity=128,
        attributes=stored,
    )  # fmt: skip
    major, minor = torch.cuda.get_device_capability()
    spec = Spec(16, 4, 64, 96, dtype, key_bits=8, value_bits=4)
    index_path = compile(spec, major * 10 + minor, tmp_path)
    index = json.loads(index_path.read_text())
    inputs = case.inputs(dtype)
    tensors = {name: tensor for name, tensor in to_tensors(inputs, "cuda").items() if tensor is not None}
    batch, heads, tokens, _ = tensors["query"].shape
    tensors["output"] = tensors["query"].new_empty(batch, tokens, heads * 96)
    tensors["present_head_map"] = torch.empty_like(tensors["past_head_map"])
    pages, kept, length = tensors["key_cache"].shape[:3]
    symbols = {name: value for name, value in index["symbols"].items() if isinstance(value, int)}
    symbols |= {"B": batch, "S": tokens, "R": kept, "C": tensors["page_table"].shape[1] * length}
    symbols |= {"N": pages, "L": length, "online": 1, "window": 0}
    _launch_all(index, tmp_path, tensors, symbols, 64**-0.5)
    caches = [tensors[name] for name in CACHES]
    result = Result(tensors["output"], *caches, tensors["present_head_map"])
    check_result(case, inputs, result, dtype)


def _launch_all(
    index: dict[str, Any],
    folder: Path,
    tensors: dict[str, torch.Tensor],
    symbols: dict[str, int],
    scale: float,
) -> None:
    from chai_export.kernels.formula import evaluate

    driver = ctypes.CDLL("libcuda.so.1")
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    sizes = {
        s["name"]: evaluate(s["count"], symbols) * ELEMENT_TYPES[s["type"]].item_size
        for s in index["workspace"]
    }
    workspace = {name: torch.empty(size, dtype=torch.uint8, device="cuda") for name, size in sizes.items()}
    addresses |= {name: section.data_ptr() for name, section in workspace.items()}
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    for launch in index["launches"]:
        if not evaluate(launch["when"], symbols):
            continue
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        image = (folder / launch["file"]).read_bytes()
        _done(driver.cuModuleLoadData(ctypes.byref(module), image))
        _done(driver.cuModuleGetFunction(ctypes.byref(function), module, launch["kernel"].encode()))
        _done(driver.cuFuncSetAttribute(function, MAX_SHARED_ATTRIBUTE, launch["shared_bytes"]))
        values: list[Any] = []
        for argument in launch["arguments"]:
            if argument["type"] == "pointer":
                values.append(ctypes.c_void_p(addresses.get(argument.get("tensor", ""), 0)))
            elif argument["type"] == "float32":
                values.append(ctypes.c_float(scale if argument["attribute"] == "scale" else 0.0))
            else:
                values.append(ctypes.c_int32(evaluate(argument["value"], symbols)))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = [evaluate(formula, symbols) for formula in launch["grid"]]
        block = [launch["threads"], 1, 1]
        _done(driver.cuLaunchKernel(function, *grid, *block, launch["shared_bytes"], stream, pointers, None))
    torch.cuda.synchronize()


def _done(code: int) -> None:
    assert code == 0, f"CUDA driver error {code}"
