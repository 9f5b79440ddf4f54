"""TensorRT-RTX's own ONNX parser, which needs no GPU, on a bundle's graph without its attention nodes.

It has no plugins, so the graph is cut: what attention takes becomes outputs, what it gives inputs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir

from chai_export.op.schema import DOMAIN

PARSE = """
import sys
import tensorrt_rtx_bindings as trt

class Quiet(trt.ILogger):
    def log(self, severity, message):
        pass

logger = Quiet()
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(sys.argv[1]):
    for index in range(parser.num_errors):
        print(parser.get_error(index).desc())
    sys.exit(1)
print(network.num_layers)
"""


def cut_at_attention(model_path: Path, target: Path) -> Path:
    """Write the graph of a bundle with its op nodes taken out, weights beside it as they were."""
    model = ir.load(model_path)
    graph = model.graph
    for node in [node for node in graph if node.domain == DOMAIN]:
        for value in node.inputs:
            if value is not None and not value.is_graph_input() and not value.is_graph_output():
                graph.outputs.append(value)
        for value in node.outputs:
            if value.is_graph_output():
                graph.outputs[:] = [output for output in graph.outputs if output is not value]
        fed = [ir.Value(name=f"fed_{v.name}", type=v.type, shape=v.shape) for v in node.outputs]
        for old, new in zip(node.outputs, fed, strict=True):
            if old.uses():
                graph.inputs.append(new)
                ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
    model.functions.clear()
    ir.save(model, target)
    onnx.load(target, load_external_data=False)
    return target


def parse(path: Path) -> tuple[int, str]:
    """Layers of the network, or 0, and what the parser said; in a process that a signal may end."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(path)], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode == 0:
        return int(done.stdout), ""
    return 0, done.stdout.strip() or f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
