"""Time and memory of rewriting a 7 B-shaped ONNX file whose weights are one sparse file of zeros.

The rewrite runs in a process of its own while its resident memory is sampled. Claims: less than 90 s, less
than 4 GB.

    python benchmarks/large_rewrite.py                     # 32 layers, 13 GB of float16 zeros, no disk used
    python benchmarks/large_rewrite.py --dtype float32     # 27 GB
    python benchmarks/large_rewrite.py --layers 2 --output /tmp/small.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from chai_export.op.dtypes import ELEMENT_TYPES

RESULT = Path(__file__).parent / "results" / "large_rewrite.json"
TIME_CLAIM_S, MEMORY_CLAIM = 90.0, 4e9
HIDDEN, INNER, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 4096, 11008, 32, 128, 32000, 4096


class Decoder:
    """A Llama of standard operators (opset 23) whose weights are holes in one file."""

    def __init__(self, directory: Path, layers: int, dtype: str) -> None:
        self.path, self.layers, self.offset = directory / "model.onnx", layers, 0
        element = ELEMENT_TYPES[dtype]
        self.kind, self.size, self.number = element.onnx, element.item_size, element.numpy
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int) -> str:
        tensor = TensorProto(name=name, data_type=self.kind, dims=shape, data_location=TensorProto.EXTERNAL)
        length = int(np.prod(shape)) * self.size
        for key, value in (("location", "model.onnx.data"), ("offset", self.offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.offset += length
        self.initializers.append(tensor)
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: list[str], *outputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}_{len(self.nodes)}", **attributes))
        return outputs[0]

    def layer(self, i: int, x: str) -> str:
        width, name = HEADS * HEAD_DIM, f"layers.{i}"
        h = self.node("RMSNormalization", [x, self.weight(f"{name}.norm1", HIDDEN)], f"{name}.h1", axis=-1)
        q, k, v = (
            self.node("MatMul", [h, self.weight(f"{name}.{part}", HIDDEN, width)], f"{name}.{part}.out")
            for part in "qkv"
        )
        q, k = (
            self.node(
                "RotaryEmbedding", [part, "cos", "sin", "position_ids"], f"{part}.rotated", num_heads=HEADS
            )
            for part in (q, k)
        )
        y = self.node(
            "Attention",
            [q, k, v, "mask", f"past_key_values.{i}.key", f"past_key_values.{i}.value"],
            *(f"{name}.attention", f"present.{i}.key", f"present.{i}.value"),
            q_num_heads=HEADS,
            kv_num_heads=HEADS,
        )
        y = self.node("MatMul", [y, self.weight(f"{name}.o", width, HIDDEN)], f"{name}.o.out")
        x = self.node("Add", [x, y], f"{name}.x1")
        h = self.node("RMSNormalization", [x, self.weight(f"{name}.norm2", HIDDEN)], f"{name}.h2", axis=-1)
        gate = self.node("MatMul", [h, self.weight(f"{name}.gate", HIDDEN, INNER)], f"{name}.gate.out")
        gate = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        up = self.node("MatMul", [h, self.weight(f"{name}.up", HIDDEN, INNER)], f"{name}.up.out")
        h = self.node("Mul", [gate, up], f"{name}.gated")
        h = self.node("MatMul", [h, self.weight(f"{name}.down", INNER, HIDDEN)], f"{name}.down.out")
        return self.node("Add", [x, h], f"{name}.x2")

    def mask(self) -> None:
        """Bool [B,1,S,T]: not in the future, not padding."""
        self.constant("zero", np.array(0))
        self.constant("one", np.array(1))
        total = self.node(
            "Squeeze", [self.node("Shape", ["attention_mask"], "s1", start=1, end=2)], "n_total"
        )
        new = self.node("Squeeze", [self.node("Shape", ["input_ids"], "s2", start=1, end=2)], "n_new")
        first = self.node("Sub", [total, new], "n_past")
        columns = self.node("Range", ["zero", total, "one"], "columns")
        rows = self.node("Range", [first, total, "one"], "rows")
        rows = self.node("Unsqueeze", [rows, self.constant("axis1", np.array([1]))], "rows_2d")
        causal = self.node("LessOrEqual", [columns, rows], "causal")
        padding = self.node("Cast", ["attention_mask"], "padding", to=TensorProto.BOOL)
        padding = self.node("Unsqueeze", [padding, self.constant("axes", np.array([1, 2]))], "padding_4d")
        self.node("And", [causal, padding], "mask")

    def write(self) -> int:
        """Write model.onnx and its sparse data file; bytes of weights."""
        angles = np.outer(np.arange(POSITIONS), 1e4 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        self.constant("cos", np.cos(angles).astype(self.number))
        self.constant("sin", np.sin(angles).astype(self.number))
        self.mask()
        x = self.node("Gather", [self.weight("embedding", VOCABULARY, HIDDEN), "input_ids"], "x")
        for i in range(self.layers):
            x = self.layer(i, x)
        x = self.node("RMSNormalization", [x, self.weight("norm", HIDDEN)], "last", axis=-1)
        self.node("MatMul", [x, self.weight("head", HIDDEN, VOCABULARY)], "logits")
        ids = [("input_ids", "tokens"), ("position_ids", "tokens"), ("attention_mask", "total")]
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", n]) for name, n in ids]
        outputs = [helper.make_tensor_value_info("logits", self.kind, ["batch", "tokens", VOCABULARY])]
        for i in range(self.layers):
            for part in ("key", "value"):
                for values, name, rows in (
                    (inputs, "past_key_values", "past"),
                    (outputs, "present", "total"),
                ):
                    shape = ["batch", HEADS, rows, HEAD_DIM]
                    values.append(helper.make_tensor_value_info(f"{name}.{i}.{part}", self.kind, shape))
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 23)]
        self.path.write_bytes(
            helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
        )
        with self.path.with_name("model.onnx.data").open("wb") as data:
            data.truncate(self.offset)
        return self.offset


def child(source: str, target: str, layers: int) -> None:
    from chai_export.clustering.clusters import Clusters
    from chai_export.graph.stage import rewrite

    start = time.perf_counter()
    bundle = rewrite(source, Clusters(kept_heads=[HEADS // 2] * layers), target)
    print(json.dumps({"seconds": time.perf_counter() - start, "proof": bundle.manifest.proof.compared}))


def sample(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Watch the resident memory, pages of mapped weight files included."""
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak[0] = max(peak[0], watched.memory_info().rss)
        except psutil.NoSuchProcess:
            return
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument(
        "--directory", type=Path, help="where to make the files (default: a temporary directory)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        source = Path(name) / "source"
        source.mkdir()
        weights = Decoder(source, arguments.layers, arguments.dtype).write()
        code = (
            "import sys; from large_rewrite import child; child(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
        )
        command = [sys.executable, "-c", code, str(source), f"{name}/bundle", str(arguments.layers)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
        peak = [0]
        watcher = threading.Thread(target=sample, args=(process, peak))
        watcher.start()
        out, _ = process.communicate()
        watcher.join()
        if process.returncode:
            raise SystemExit(process.returncode)
    result = json.loads(out.strip().splitlines()[-1])
    record = {
        "layers": arguments.layers,
        "dtype": arguments.dtype,
        "weight_bytes": weights,
        "seconds": round(result["seconds"], 1),
        "peak_resident_bytes": peak[0],
        "proof": result["proof"],
        "claims_met": result["seconds"] < TIME_CLAIM_S and peak[0] < MEMORY_CLAIM,
        "machine": f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} CPUs",
        "onnxruntime": version("onnxruntime"),
        "date": date.today().isoformat(),
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    if arguments.layers == 32 and not record["claims_met"]:
        raise SystemExit("a claim does not hold")


if __name__ == "__main__":
    main()
