"""Fold ``Transpose(weight)`` without holding the transposed copy in memory.

``x @ weight.T`` leaves a Transpose of each weight in the exported graph. Folding them at once would hold
every weight twice; here the folded tensor is computed when it is written and forgotten afterwards.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

TRANSPOSED = ".transposed"
"""Ends the name of a matrix that was stored by output."""


def fold_weight_transposes(model: ir.Model) -> int:
    """Replace each Transpose of an initializer with an initializer that is transposed when it is read.

    One whose source is read as it is too stays where it is: a tied embedding is stored once.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    folded = 0
    seen: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or source is None or source.const_value is None:
            continue
        if source.is_graph_output() or node.outputs[0].is_graph_output():
            continue
        if any(reader.op_type != "Transpose" for reader in source.consumers()):
            continue  # a tied embedding: the file would hold it twice
        tensor = source.const_value
        given = node.attributes.get("perm")
        perm = tuple(given.as_ints()) if given is not None else tuple(reversed(range(len(tensor.shape))))
        key = (id(source), perm)
        if key not in seen:
            name = f"{source.name}{TRANSPOSED}" + ("" if len(perm) == 2 else "_".join(map(str, perm)))
            seen[key] = _transposed(name, tensor, perm)
            graph.register_initializer(seen[key])
        ir.convenience.replace_all_uses_with(node.outputs[0], seen[key])
        graph.remove(node, safe=True)
        folded += 1
        if not source.uses() and source.name in graph.initializers:
            del graph.initializers[str(source.name)]
    return folded


def _transposed(name: str, tensor: ir.TensorProtocol, perm: tuple[int, ...]) -> ir.Value:
    shape = ir.Shape([tensor.shape.numpy()[axis] for axis in perm])

    def read() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(perm)), dtype=tensor.dtype, name=name)

    lazy = ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, cache=False, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
