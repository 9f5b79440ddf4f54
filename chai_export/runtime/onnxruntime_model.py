"""Opening a bundle's graph in ONNX Runtime, and the few calls to it that a session needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.op_nodes import check_op_nodes
from chai_export.errors import ChaiError, reason
from chai_export.op.dtypes import ELEMENT_TYPES, Dtype
from chai_export.runtime.native import SWITCH
from chai_export.runtime.onnxruntime_gpu import CacheDevice

_COMPUTED = (Dtype.FLOAT32, Dtype.FLOAT16)
"""What ONNX Runtime's CPU provider has operators for."""
_ELEMENT_TYPES = {element.onnxruntime: name for name, element in ELEMENT_TYPES.items()}
_QUIET = 4  # what it would log as an error is raised as well
_ERRORS = 3  # a provider that does not start raises nothing
_KERNELS_ENTRY = "chai.gpu_kernels"
"""What the op's library asks a session's configuration for."""
_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class GraphInMemory:
    """A graph that is in no file: its bytes, and the weights that are not among them.

    ``directory`` is where names of weight files count from, ``weights`` are OrtValues by name.
    """

    data: bytes
    directory: str
    weights: Mapping[str, Any]

    def open(self, options: Any) -> Any:
        """An InferenceSession of the graph; ``weights`` must live as long as it does."""
        if self.directory:
            options.add_session_config_entry(_FOLDER, self.directory)
        options.add_external_initializers(list(self.weights), list(self.weights.values()))
        return ort.InferenceSession(self.data, options, providers=["CPUExecutionProvider"])


def open_model(
    bundle: Bundle,
    library: Path | None,
    threads: int,
    spin_after: bool,
    graph: GraphInMemory | None = None,
    gpu: CacheDevice | None = None,
) -> Any:
    """An InferenceSession of the bundle's graph, which fits its manifest.

    Args:
        bundle: whose graph.
        library: custom ops to register; None runs the function bodies.
        threads: threads within an operator; 0 lets ONNX Runtime decide.
        spin_after: whether idle threads go on spinning after a step, for the sake of the next one soon.
        graph: in place of the bundle's; it must fit the manifest as that does.
        gpu: that computes what it can.

    Raises:
        ChaiError: the bundle is bfloat16, its graph does not fit its manifest or ONNX Runtime, or that has no
            use for the GPU.
    """
    if bundle.manifest.dtype not in _COMPUTED:
        raise ChaiError(
            f"{bundle.path} is {bundle.manifest.dtype}, which ONNX Runtime does not compute on a CPU; "
            f"export with --dtype {' or '.join(_COMPUTED)}"
        )
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    if not spin_after:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    model = str(bundle.model_path)
    providers = ["CPUExecutionProvider"]
    if gpu is not None:
        options.add_session_config_entry(_KERNELS_ENTRY, str(gpu.kernels))
        options.log_severity_level = _ERRORS
        providers = list(dict.fromkeys([gpu.provider, *providers]))
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN of their own packages
    if library is not None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            raise ChaiError(
                f"{library} does not load in ONNX Runtime {ort.__version__} ({reason(error)}); "
                f"build it again, or set {SWITCH}=0 to run without it"
            ) from error
    try:
        if graph is not None:
            session = graph.open(options)
        else:
            session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        hint = f" or set {SWITCH}=0" if library is not None else ""
        raise ChaiError(
            f"ONNX Runtime {ort.__version__} cannot load {model} ({reason(error)}); export again{hint}"
        ) from error
    if session.get_providers()[0] != providers[0]:
        raise ChaiError(
            f"ONNX Runtime {ort.__version__} could not start its {providers[0]} (its message says why); "
            "install the CUDA and cuDNN it asks for, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    _check_graph(session, bundle)
    if graph is None:
        check_op_nodes(bundle)
    return session


def output_type(session: Any, name: str) -> np.dtype[Any]:
    """dtype of an output of the graph."""
    kinds = {node.name: _ELEMENT_TYPES[node.type] for node in session.get_outputs()}
    return ELEMENT_TYPES[kinds[name]].numpy


def shared_value(array: NDArray[Any]) -> Any:
    """An OrtValue over the array's own memory (it keeps a reference to it)."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def _check_graph(session: Any, bundle: Bundle) -> None:
    """Compare names, types and known sizes of the graph with the manifest, before garbage can come out."""
    given = {
        node.name: (_ELEMENT_TYPES.get(node.type, node.type), node.shape)
        for node in chain(session.get_inputs(), session.get_outputs())
    }
    difference = bundle.manifest.io.difference(given)
    if difference is not None:
        raise ChaiError(
            f"{bundle.model_path} does not fit its manifest: {difference}; export or rewrite again"
        )
