"""One op node alone in an ONNX Runtime session: run on NumPy arrays without copying them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from chai_export.bench.tensors import ort_value
from chai_export.op.attributes import Attributes
from chai_export.op.model import node_model
from chai_export.op.schema import OP_TYPE, signature

Tensor = NDArray[Any]


class OpSession:
    """One node, evaluated by a custom-op library.

    Args:
        attributes: of the node.
        dtype: T: float32, float16 or bfloat16.
        library: libchai_onnxruntime.so.
        op_type: which op.
        sinks: whether the node has sinks.
        slopes: whether it has alibi slopes.
        threads: threads of ONNX Runtime's pool.
    """

    def __init__(
        self,
        attributes: Attributes,
        dtype: str,
        library: Path,
        *,
        op_type: str = OP_TYPE,
        sinks: bool = False,
        slopes: bool = False,
        threads: int = 1,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads of one session must not take the cores of the next one measured.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # errors reach the caller as exceptions
        options.register_custom_ops_library(str(library))
        model = node_model(
            attributes, dtype, sinks=sinks, slopes=slopes, op_type=op_type, with_function=False
        )
        self._outputs = signature(op_type).outputs
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, ["CPUExecutionProvider"]
        )

    def bind(self, inputs: Mapping[str, Tensor], *, in_place: bool) -> BoundOp:
        """Bind arrays once, to run them many times.

        Args:
            inputs: by name, contiguous.
            in_place: write the caches of ``inputs`` instead of arrays of their own.
        """
        batch, heads, tokens, _ = inputs["query"].shape
        outputs: dict[str, Tensor] = {}
        binding = self._session.io_binding()
        values = {name: ort_value(array) for name, array in inputs.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for output in self._outputs:
            source = output.follows
            if source is None:
                width = heads * inputs["value"].shape[3]
                outputs[output.name] = np.empty((batch, tokens, width), inputs["query"].dtype)
            elif source not in inputs:
                continue
            elif in_place and source != "past_head_map":
                outputs[output.name] = inputs[source]
                binding.bind_ortvalue_output(output.name, values[source])
                continue
            else:
                outputs[output.name] = np.empty_like(inputs[source])
            binding.bind_ortvalue_output(output.name, ort_value(outputs[output.name]))
        return BoundOp(self._session, binding, dict(inputs), outputs)


class BoundOp:
    """Inputs and outputs of one session, bound. ``outputs`` holds what the last :meth:`run` wrote."""

    def __init__(
        self, session: Any, binding: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
    ) -> None:
        self._session = session
        self._binding = binding
        self._inputs = inputs  # the arrays must outlive the binding
        self.outputs = outputs

    def run(self) -> dict[str, Tensor]:
        """Evaluate the op; raises what ONNX Runtime raises."""
        self._session.run_with_iobinding(self._binding)
        return self.outputs
