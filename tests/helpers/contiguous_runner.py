"""Drives the plain form of a bundle's graph by hand in ONNX Runtime: caches without pages."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnxruntime as ort

from chai_export.bundle.bundle import Bundle
from chai_export.engines.plain_network import plain_network
from chai_export.engines.tensorrt import save
from chai_export.op.dtypes import ELEMENT_TYPES
from tests.helpers.graph_runner import GraphRunner, _filled


class ContiguousRunner(GraphRunner):
    """As its parent, on :func:`~chai_export.engines.plain_network.plain_network`."""

    def __init__(self, bundle: Bundle, batch: int, capacity: int, heads: str = "all") -> None:
        super().__init__(bundle, batch, capacity, heads)
        model = plain_network(bundle, bundle.manifest.heads(heads))
        path = bundle.path / f"plain-{heads}.onnx"
        save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        path.unlink()
        shapes: dict[str, Sequence[int | str]] = {
            value.name: value.shape for value in self.session.get_inputs()
        }
        self._takes = set(shapes)
        for cache in bundle.manifest.io.caches:
            _, rows, _, width = shapes[cache.past.name]
            assert isinstance(rows, int)
            assert isinstance(width, int)
            element = ELEMENT_TYPES[cache.past.dtype].numpy
            self.caches[cache.past.name] = _filled((batch, rows, capacity, width), element)
