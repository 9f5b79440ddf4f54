"""Read an ONNX file and bring it into the one form that the matchers expect."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from chai_export.errors import ChaiError
from chai_export.graph.read.cache_branch import choose_cache_branch
from chai_export.graph.read.check import check_model
from chai_export.graph.read.external_data import external_tensors, locate_external_data
from chai_export.graph.read.normalise import normalise
from chai_export.graph.read.omitted_outputs import remember_omitted_outputs
from chai_export.graph.read.quantised_caches import take_caches_as_floats
from chai_export.graph.read.quiet import quiet_onnx_ir
from chai_export.graph.read.unfuse import unfuse

_PREFERRED = ("decoder.onnx", "model.onnx", "decoder_model.onnx")


def find_onnx(path: Path) -> Path:
    """The ONNX file at ``path``, or the one inside it if it is a directory.

    Raises:
        ChaiError: there is none, or several and none has a usual name.
    """
    if path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        raise ChaiError(
            f"{path} is a link to {os.path.realpath(path)}, which does not exist; download the model again"
        )
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


@quiet_onnx_ir()
def read_model(path: Path) -> ir.Model:
    """Read an ONNX file; external weights stay on disk until they are used.

    Both the file and its data may be links, as in the cache of huggingface_hub: the data is looked for beside
    the link and beside the file that it leads to.

    Raises:
        ChaiError: it is missing or damaged, or external data is missing or too short.
    """
    file = find_onnx(path)
    try:
        proto = onnx.load_model(file, load_external_data=False)
        check_model(file, proto)
        model = ir.from_proto(proto)
        locate_external_data(file, model)
    except ChaiError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise whatever the damaged bytes provoke
        raise ChaiError(
            f"{file} is not a readable ONNX model ({_one_line(error)}); export or download it again"
        ) from error
    return model


def data_files(path: Path) -> list[Path]:
    """The files in which an ONNX file keeps its weights; none if it holds them itself.

    Raises:
        ChaiError: as :func:`read_model`.
    """
    return sorted({Path(tensor.path) for tensor in external_tensors(read_model(path))})


@quiet_onnx_ir()
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
        remember_omitted_outputs(model)
        choose_cache_branch(model)
        take_caches_as_floats(model.graph)
        normalise(model)
        unfuse(model)
    except ChaiError:
        raise
    except Exception as error:  # a graph with dangling names or cycles breaks passes in many ways
        raise ChaiError(f"{path} has a malformed graph ({_one_line(error)}); export it again") from error
    return model


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
