"""What commands import before they answer: torch and transformers take seconds, and running needs neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chai_export.clustering.clusters import Clusters
from tests.cli.conftest import REPOSITORY
from tests.helpers.tiny_graph import TinyModel, letters_tokenizer

HEAVY = {"torch", "transformers", "huggingface_hub", "onnxscript", "matplotlib", "scipy", "pandas"}
GRAPHS = {"onnx_ir", "sympy"}
"""What reading an ONNX graph takes, and running a bundle does not."""
REPORT = """
import sys
from chai_export.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print("\\nimported", code, len(sys.modules), *{name.split(".")[0] for name in sys.modules})
"""
MOST_MODULES = 1500
"""In sys.modules; with transformers there are more than 3,000."""


def imported(*arguments: object) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", REPORT, *map(str, arguments)],
        capture_output=True, input="the cat\n", text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    word, code, count, *names = done.stdout.splitlines()[-1].split()
    assert (word, code) == ("imported", "0"), done.stdout
    return int(count), set(names)


@pytest.mark.parametrize(
    "command", ["run", "run a chat", "inspect", "inspect a graph", "doctor", "--help", "chat"]
)
def test_commands_that_only_run_import_nothing_heavy(command: str, bundle: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = TinyModel().write(tmp_path / "chat", tokenizer=letters_tokenizer(chat_template=template))
    Clusters(kept_heads=chat.manifest.kept_heads).save(chat.path / "clusters.json")
    graph = REPOSITORY / "tests" / "fixtures" / "onnx" / "B-torch-2.13.0-opset18-eager-mha"
    arguments = {
        "run": ["run", bundle, "--prompt", "the cat", "--max-new-tokens", 2],
        "run a chat": ["run", chat.path, "--prompt", "the cat", "--chat", "--max-new-tokens", 2],
        "inspect": ["inspect", bundle],
        "inspect a graph": ["inspect", graph],
        "doctor": ["doctor"],
        "--help": ["--help"],
        "chat": ["chat", chat.path, "--max-new-tokens", 2],
    }[command]
    count, names = imported(*arguments)
    assert not names & (HEAVY if command == "inspect a graph" else HEAVY | GRAPHS)
    assert count < MOST_MODULES
