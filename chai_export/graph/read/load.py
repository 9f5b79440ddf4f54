"""Read an ONNX file and bring it into the one form that the matchers expect."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.read.normalise import normalise
from chai_export.graph.read.unfuse import unfuse

_PREFERRED = ("decoder.onnx", "model.onnx", "decoder_model.onnx")


def find_onnx(path: Path) -> Path:
    """The ONNX file at ``path``, or the one inside it if it is a directory.

    Raises:
        ChaiError: there is none, or several and none has a usual name.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ChaiError(f"{path} does not exist; name an ONNX file or a directory that holds one")
    found = sorted(path.glob("*.onnx"))
    usual = [path / name for name in _PREFERRED if (path / name) in found]
    if len(found) != 1 and not usual:
        names = ", ".join(file.name for file in found)
        raise ChaiError(
            f"{path} holds {'several ONNX files: ' + names if found else 'no ONNX file'}; "
            "name the ONNX file itself"
        )
    return usual[0] if usual else found[0]


def read_model(path: Path) -> ir.Model:
    """Read an ONNX file; external weights stay on disk until they are used.

    Raises:
        ChaiError: it is missing or damaged, or external data is missing or too short.
    """
    file = find_onnx(path)
    try:
        model = ir.load(file)
        if not model.graph.outputs or not len(model.graph):
            raise ChaiError(f"{file} is not a readable ONNX model (its graph is empty); export it again")
        _check_outputs(file, model)
        _check_external_data(file, model)
    except ChaiError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise whatever the damaged bytes provoke
        raise ChaiError(
            f"{file} is not a readable ONNX model ({_one_line(error)}); export or download it again"
        ) from error
    return model


def _check_outputs(file: Path, model: ir.Model) -> None:
    made = {output for node in model.graph for output in node.outputs}
    made |= {*model.graph.inputs, *model.graph.initializers.values()}
    for value in model.graph.outputs:
        if value not in made:
            raise ChaiError(
                f"{file} is broken: no node produces its output {value.name} (onnxruntime-genai 0.18 writes "
                "such files for fp32 on cuda and dml); build it again with another precision or for the CPU"
            )


def load_graph(path: Path) -> ir.Model:
    """Read an ONNX file, normalise it (:func:`normalise`) and take fused operators apart (:mod:`unfuse`).

    Raises:
        ChaiError: as :func:`read_model`; or the graph is malformed, or uses no standard operators.
    """
    model = read_model(path)
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None:
        raise ChaiError(f"{path} imports no standard ONNX operators; it is not a language model")
    try:
        normalise(model)
        unfuse(model)
    except ChaiError:
        raise
    except Exception as error:  # a graph with dangling names or cycles breaks passes in many ways
        raise ChaiError(f"{path} has a malformed graph ({_one_line(error)}); export it again") from error
    return model


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """The initializers whose bytes lie in other files."""
    values = model.graph.initializers.values()
    return [value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor)]


def _check_external_data(file: Path, model: ir.Model) -> None:
    sizes: dict[Path, int] = {}
    for tensor in external_tensors(model):
        data = Path(tensor.path)
        inside = data.resolve().is_relative_to(file.resolve().parent)
        if not inside:
            raise ChaiError(
                f"{file} refers to weights outside its directory ({tensor.location}); move them in"
            )
        if data not in sizes:
            if not data.is_file():
                raise ChaiError(
                    f"{file} needs its weights in {data.name}, which is missing; "
                    f"put that file into {data.parent}"
                )
            sizes[data] = data.stat().st_size
        length = tensor.length if tensor.length is not None else tensor.nbytes
        if (tensor.offset or 0) + length > sizes[data] or length < tensor.nbytes:
            raise ChaiError(
                f"{data} is too short for tensor {tensor.name} ({sizes[data]} bytes); "
                "download or export the model again"
            )


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
