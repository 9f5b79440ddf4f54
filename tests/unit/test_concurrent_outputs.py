"""Many processes write and read one output at the same time: nobody misses it, mixes it up or trips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from chai_export.bundle.bundle import Bundle
from tests.helpers.tiny_graph import TinyModel

WRITERS, READERS, ROUNDS = 4, 4, 125  # 1,000 calls

PROGRAM = """
import os, sys
from pathlib import Path
from chai_export.bundle import exchange
from chai_export.bundle.atomic import atomic_directory, atomic_file
from chai_export.bundle.bundle import Bundle, finalise
from chai_export.bundle.manifest import read_manifest
from chai_export.bundle.parts import BUNDLE
from chai_export.clustering.clusters import CLUSTERS, Clusters

role, rounds, folder, template = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
if sys.argv[5] == "renamed twice":
    exchange.exchange = lambda one, other: False
manifest = read_manifest(template)
print("ready", flush=True)
sys.stdin.readline()
for number in range(rounds):
    mark = f"{os.getpid()}-{number}"
    if role == "write":
        with atomic_directory(folder / "bundle", BUNDLE) as directory:
            for name in ("model.onnx", *(f"part{i}" for i in range(number % 4))):
                (directory / name).write_text(mark * (1 + number % 7))
            finalise(directory, manifest.model_copy(update={"created_with": mark}))
        Clusters((1,), model=mark).save(folder / "clusters.json")
    else:
        bundle = Bundle.load(folder / "bundle")
        assert "model.onnx" in bundle.manifest.files
        assert (folder / "bundle").is_dir() or sys.argv[5] == "renamed twice"
        Clusters.load(folder / "clusters.json")
"""


@pytest.mark.parametrize("way", ["exchanged", "renamed twice"])
def test_a_thousand_writes_and_reads_of_one_target_miss_nothing(tmp_path, way):
    template = TinyModel().write(tmp_path / "template").path
    folder = tmp_path / "folder"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = [sys.executable, "-c", PROGRAM, "write", "1", str(folder), str(template), way]
    subprocess.run(first, input="\n", text=True, check=True, env=environment, stdout=subprocess.DEVNULL)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, role, str(ROUNDS), str(folder), str(template), way],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for role in ["write"] * WRITERS + ["read"] * READERS
    ]  # fmt: skip
    for process in processes:  # all begin when all are there
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(len(processes)) as pool:
        ends = list(pool.map(lambda process: process.communicate("\n"), processes))
    complaints = [line for _, err in ends for line in err.splitlines() if not line.startswith("waiting for")]
    assert "\n".join(complaints) == ""
    assert [process.returncode for process in processes] == [0] * len(processes)
    Bundle.load(folder / "bundle")
    assert sorted(os.listdir(folder)) == ["bundle", "clusters.json"]
    time.sleep(0.1)  # hashes of files that have just changed are not remembered
    last = [sys.executable, "-c", PROGRAM, "read", "1", str(folder), str(template), way]
    subprocess.run(last, input="\n", text=True, check=True, env=environment, stdout=subprocess.DEVNULL)
    assert isinstance(json.loads((tmp_path / "cache/chai_export/hashes.json").read_text()), dict)
