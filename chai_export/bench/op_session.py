"""The op alone in an ONNX Runtime session: a one-node model run on NumPy arrays without copying them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from chai_export.bench.tensors import ort_value
from chai_export.op.model import node_model
from chai_export.op.reference import AttentionResult
from chai_export.op.schema import signature

Tensor = NDArray[Any]
CACHES = ("key", "value")


class OpSession:
    """Runs the op through a custom-op library.

    Args:
        attributes: all attributes of the node.
        dtype: storage type, float32, float16 or bfloat16.
        library: libchai_onnxruntime.so.
        threads: threads of ONNX Runtime's pool.
    """

    def __init__(
        self, attributes: Mapping[str, float | int], dtype: str, library: Path, *, threads: int = 1
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads of one session must not take the cores of the next one measured.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # errors reach the caller as exceptions
        options.register_custom_ops_library(str(library))
        self._session = onnxruntime.InferenceSession(
            node_model(dict(attributes), dtype).SerializeToString(), options, ["CPUExecutionProvider"]
        )

    def bind(self, inputs: Mapping[str, Tensor], *, in_place: bool) -> BoundOp:
        """Bind arrays once, to run them many times.

        Args:
            inputs: the eight inputs by name, contiguous.
            in_place: write the caches of ``inputs`` instead of arrays of their own.
        """
        return BoundOp(self._session, inputs, in_place=in_place)


class BoundOp:
    """Inputs and outputs of one session, bound. ``result`` holds what the last :meth:`run` wrote."""

    def __init__(
        self, session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor], *, in_place: bool
    ) -> None:
        batch, heads, tokens, _ = inputs["query"].shape
        value_dim = inputs["value"].shape[3]
        dtype = inputs["query"].dtype
        caches = {
            name: inputs[f"past_{name}"] if in_place else np.empty_like(inputs[f"past_{name}"])
            for name in CACHES
        }
        self.result = AttentionResult(
            output=np.empty((batch, tokens, heads * value_dim), dtype),
            present_key=caches["key"],
            present_value=caches["value"],
            present_head_map=np.empty_like(inputs["past_head_map"]),
        )
        self._session = session
        self._inputs = dict(inputs)  # the arrays must outlive the binding
        self._binding = session.io_binding()
        values = {name: ort_value(inputs[name]) for name in signature().input_names}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in signature().output_names:
            past = name.replace("present", "past")
            shared = in_place and name in ("present_key", "present_value")
            value = values[past] if shared else ort_value(getattr(self.result, name))
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> AttentionResult:
        """Evaluate the op; raises what ONNX Runtime raises."""
        self._session.run_with_iobinding(self._binding)
        return self.result
