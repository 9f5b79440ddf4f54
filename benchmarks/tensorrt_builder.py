"""What a real TensorRT parser and builder make of bundles, on a machine without a GPU.

Writes benchmarks/results/tensorrt_builder.json and the tables of docs/tensorrt.md. TensorRT-RTX (on PyPI)
takes no plugins, so each bundle's network is cut at its attentions; everything else is parsed and built with
the profiles and the code of `chai-export build --backend tensorrt`. The models are those of the tests.

    export PYTHONPATH=.
    python benchmarks/tensorrt_builder.py                         # fixtures, and every family in three dtypes
    python benchmarks/tensorrt_builder.py --bundle NAME=BUNDLE    # and a bundle of yours
    python benchmarks/tensorrt_builder.py --tables                # the page again from the results

Rows that are in the results already are not made again unless --again is given, so that a run that was broken
off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorrt_builder_page
import torch
from onnxruntime.quantization import quantize_dynamic

from chai_export.bench.machine import describe
from chai_export.bundle.atomic import atomic_file
from chai_export.bundle.bundle import Bundle
from chai_export.clustering.clusters import Clusters
from chai_export.engines.build import DEFAULT_MAX_SEQ
from chai_export.graph.stage import rewrite
from chai_export.progress import note
from tests.helpers.exported import bundle_in
from tests.helpers.families import FAMILIES
from tests.helpers.onnx_fixtures import REWRITTEN, Fixture
from tests.helpers.tensorrt_rtx import build_cut

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tensorrt_builder.json"
DTYPES = ("float16", "bfloat16", "float32")
PACKAGES = ("tensorrt-rtx-cu13-bindings", "polygraphy", "onnx", "torch", "transformers")
DYNAMIC = "A-torch-2.13.0-opset18-sdpa-gqa"
"""The fixture that is also built from what onnxruntime's quantize_dynamic makes of it."""

Row = dict[str, Any]
Make = Callable[[Path], Bundle]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=DIR", help="a bundle of yours")
    parser.add_argument("--only", metavar="SOURCE", help="fixture, family or bundle")
    parser.add_argument("--again", action="store_true", help="make every row again")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: Row = {"rows": []}
    if arguments.output.is_file() and not arguments.again:
        results = json.loads(arguments.output.read_text("utf-8"))
    done = {(row["source"], row["model"], row["dtype"]) for row in results["rows"]}
    torch.set_num_threads(1)
    for source, model, dtype, make, limits in () if arguments.tables else cases(arguments):
        if (source, model, dtype) in done or arguments.only not in (None, source):
            continue
        note(f"building {source} {model} {dtype}")
        row = {"source": source, "model": model, "dtype": dtype}
        with tempfile.TemporaryDirectory() as scratch:
            results["rows"].append({**row, **measure(make(Path(scratch)), *limits)})
        results["machine"] = describe()
        results["versions"] = {name: version(name) for name in PACKAGES}
        with atomic_file(arguments.output) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tensorrt_builder_page.write(ROOT / "docs" / "tensorrt.md", results)


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str, Make, tuple[int, int]]]:
    """Source, model, dtype, how to make the bundle, and the engine's limits."""
    small = (4, 64)
    for fixture in REWRITTEN:
        dtype = "int4" if fixture.quantised else fixture.record["dtype"]
        yield "fixture", fixture.name, dtype, from_fixture(fixture), small
    dynamic = next(fixture for fixture in REWRITTEN if fixture.name == DYNAMIC)
    yield "fixture", f"{DYNAMIC}, quantize_dynamic", "int8", quantised(dynamic), small
    for dtype in DTYPES:
        for family in FAMILIES:
            yield "family", family, dtype, from_family(family, dtype), small
    for item in arguments.bundle:
        name, directory = item.split("=", 1)
        bundle = Bundle.load(directory)
        manifest = bundle.manifest
        dtype = manifest.weight_type
        limits = (8, manifest.max_positions or manifest.context_length or DEFAULT_MAX_SEQ)
        yield "bundle", name, dtype, lambda scratch, bundle=bundle: copied(bundle, scratch), limits


def measure(bundle: Bundle, max_batch: int, max_seq: int) -> Row:
    built = build_cut(bundle, max_batch, max_seq)
    return {
        "attentions": bundle.manifest.num_layers,
        "layers": built.layers,
        "seconds": round(built.seconds, 2),
        "bytes": built.size,
        "refused": built.refused.replace(str(bundle.path), "BUNDLE"),
        "limits": [max_batch, max_seq],
    }


def from_fixture(fixture: Fixture) -> Make:
    clusters = Clusters([max(1, fixture.kv_heads // 2)] * fixture.layers)
    return lambda scratch: rewrite(fixture.path, clusters, scratch / "bundle")


def quantised(fixture: Fixture) -> Make:
    def make(scratch: Path) -> Bundle:
        quantize_dynamic(fixture.path / "model.onnx", scratch / "model.onnx")
        clusters = Clusters([max(1, fixture.kv_heads // 2)] * fixture.layers)
        return rewrite(scratch / "model.onnx", clusters, scratch / "bundle")

    return make


def from_family(family: str, dtype: str) -> Make:
    return lambda scratch: bundle_in(family, dtype, scratch)


def copied(bundle: Bundle, scratch: Path) -> Bundle:
    """The bundle elsewhere: the build writes beside its weights."""
    for name in bundle.manifest.files:
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, scratch / name)
    (scratch / "manifest.json").write_bytes((bundle.path / "manifest.json").read_bytes())
    return Bundle.load(scratch)


if __name__ == "__main__":
    main()
