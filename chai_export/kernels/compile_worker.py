"""Compiles the kernels of one model for one architecture; run by :mod:`.ahead_of_time` in a clean process.

Reads a request (JSON) from standard input, writes cubins and the index into its directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chai_export.kernels.ahead_of_time import FORMAT, INDEX_NAME
from chai_export.kernels.blocks import BLOCKS_FILE, choose
from chai_export.kernels.launches import INT32_TENSORS, build_program
from chai_export.kernels.program import FLOAT_ARGUMENTS, WORKSPACE_ALIGNMENT, Launch, Program
from chai_export.kernels.spec import Spec
from chai_export.op.dtypes import ELEMENT_TYPES

POINTER_ALIGNMENT = 16
# A layer's map or sinks may lie anywhere inside a block of all layers'.
UNALIGNED_TENSORS = (*INT32_TENSORS, "sinks", "alibi_slopes")
SCRATCH_POINTERS = ("global_scratch", "profile_scratch")
PTX_TYPES = {"pointer": "u64", "int32": "u32", "float32": "f32"}


def main() -> None:
    """Compile what the request on standard input asks for."""
    request = json.load(sys.stdin)
    directory = Path(request["directory"])
    arch = int(request["arch"])
    spec = Spec(**request["spec"])
    program = build_program(spec, choose(spec, arch))
    knobs.nvidia.dump_ptxas_log = True
    launches = [
        _compile(launch, program, arch, directory)
        for launch in program.launches
        if not request["only"] or launch.name in request["only"]
    ]
    index = {
        "format": FORMAT,
        "architecture": arch,
        "spec": request["spec"],
        "triton": triton.__version__,
        "source_sha256": source_hash(),
        "symbols": {
            **program.call_symbols,
            "H": spec.num_query_heads,
            "G": spec.num_kv_heads,
            "D": spec.head_dim,
            "Dv": spec.value_head_dim,
            "P": spec.probe_tokens,
        },
        "pointer_alignment": POINTER_ALIGNMENT,
        "workspace_alignment": WORKSPACE_ALIGNMENT,
        "workspace": [
            {"name": section.name, "type": section.dtype, "count": section.count}
            for section in program.workspace
        ],
        "launches": launches,
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")


def source_hash() -> str:
    """Hash of every file that decides the cubins' bytes: device code, program, block sizes."""
    folder = Path(__file__).parent
    files = [Path(__file__), BLOCKS_FILE, folder / "program.py", folder / "launches.py"]
    files += sorted((folder / "device").glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _compile(launch: Launch, program: Program, arch: int, directory: Path) -> dict[str, Any]:
    signature, attributes = _signature(launch, program)
    source = ASTSource(launch.kernel, signature, launch.constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin: bytes = compiled.asm["cubin"]
    file = f"{launch.name}.cubin"
    (directory / file).write_bytes(cubin)
    target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    metadata = compiled.metadata
    return {
        "kernel": metadata.name,
        "file": file,
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "target": target[1] if target else f"sm_{arch}",
        "when": launch.when,
        "grid": list(launch.grid),
        "threads": metadata.num_warps * 32,
        "shared_bytes": metadata.shared,
        "arguments": _arguments(launch, compiled),
        "constants": launch.constants,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "resources": _resources(log.getvalue(), len(cubin)),
    }


def _signature(launch: Launch, program: Program) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """Triton's signature of a kernel, and the promise that pointers are aligned.

    Constants that are None stand for tensors that a node of this form does not have.
    """
    types = program.tensors | {section.name: section.dtype for section in program.workspace}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            tensor = name.removesuffix("_ptr")
            signature[name] = f"*{ELEMENT_TYPES[types[tensor]].triton}"
            if tensor not in UNALIGNED_TENSORS:
                attributes[(position,)] = [["tt.divisibility", POINTER_ALIGNMENT]]
        else:
            signature[name] = "fp32" if name in FLOAT_ARGUMENTS else "i32"
    return signature, attributes


def _arguments(launch: Launch, compiled: Any) -> list[dict[str, str]]:
    """The compiled kernel's arguments in order: the declared ones, then the pointers that Triton adds.

    Raises:
        ValueError: the parameters in the PTX are not these.
    """
    arguments: list[dict[str, str]] = []
    for name in launch.arguments:
        if name.endswith("_ptr"):
            arguments.append({"type": "pointer", "tensor": name.removesuffix("_ptr")})
        elif name in FLOAT_ARGUMENTS:
            arguments.append({"type": "float32", "attribute": name})
        else:
            arguments.append({"type": "int32", "value": launch.scalars[name]})
    entry = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    found = re.findall(r"\.param \.(?:align \d+ \.)?(\w+)", entry)
    metadata = compiled.metadata
    for pointer in SCRATCH_POINTERS[: len(found) - len(arguments)]:
        if getattr(metadata, f"{pointer}_size"):
            raise ValueError(f"{launch.name} wants {pointer} memory, which the index cannot express")
        arguments.append({"type": "pointer", "hidden": pointer})
    if found != [PTX_TYPES[argument["type"]] for argument in arguments]:
        raise ValueError(f"{launch.name} has parameters {found}, expected {arguments}")
    return arguments


def _resources(log: str, cubin_bytes: int) -> dict[str, int]:
    """What ptxas reports: registers per thread, stack and spilled bytes per thread; and the cubin's size."""
    registers = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or stack is None:
        raise ValueError("ptxas gave no report of registers")
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(stack[1]),
        "spill_store_bytes": int(stack[2]),
        "spill_load_bytes": int(stack[3]),
        "cubin_bytes": cubin_bytes,
    }


if __name__ == "__main__":
    main()
