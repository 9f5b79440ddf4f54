"""Imports go one way: down the floors of the house."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = (
    {"errors", "units", "version"},
    {"choice", "files", "arguments", "progress"},
    {"op"},
    {"bundle", "kernels"},
    {"models", "runtime"},
    {"clustering"},
    {"graph", "engines", "bench", "report"},
    {"quality", "exporter"},
    {"recipe", "serve"},
    {"cli"},
)
"""Lowest first. Rooms of one floor know nothing of each other, but for the two lowest floors."""

DOORS = {"__init__", "__main__"}
"""The package's names for the outside and its entry: they may see every room."""


def floor(room: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if room in rooms)


def imports() -> Iterator[tuple[Path, int, str, str]]:
    """File, line, room and imported room of every import of our own, those inside functions included."""
    for file in sorted((ROOT / "chai_export").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                if module.startswith("chai_export."):
                    yield file.relative_to(ROOT), node.lineno, parts[1], module.split(".")[1]


def test_every_room_has_a_floor():
    rooms = {path.name for path in (ROOT / "chai_export").iterdir() if (path / "__init__.py").is_file()}
    modules = {path.stem for path in (ROOT / "chai_export").glob("*.py")} - DOORS
    assert rooms | modules == set().union(*FLOORS)


def test_no_import_goes_up_or_across():
    wrong = [
        f"{file}:{line}: {room} imports {imported}"
        for file, line, room, imported in imports()
        if room != imported
        and not {room, imported} & DOORS
        and (floor(imported) > floor(room) or (floor(imported) == floor(room) and floor(room) > 1))
    ]
    assert not wrong, "\n".join(wrong)


WITHOUT_EXTRAS = """
import importlib, sys

MISSING = {"triton", "tensorrt", "tensorrt_lean", "polygraphy", "sklearn", "lm_eval"}
MISSING |= {"fastapi", "uvicorn", "starlette", "prometheus_client", "llguidance"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_every_room_opens_without_the_optional_packages():
    """Those of pyproject.toml's extras; the kernels are Triton's, one file is a class of lm-eval, and
    serve/api is an application of FastAPI."""
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted((ROOT / "chai_export").rglob("*.py"))
        if not {"kernels", "api"} & set(file.parts)
        and file.name not in {"__init__.py", "__main__.py", "lm_eval_model.py"}
    ]
    assert len(modules) > 200
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *modules],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
