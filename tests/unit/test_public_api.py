"""`import chai_export as ce` offers the documented names, in whatever order modules were imported."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import chai_export as ce

DOCUMENTED = ("calibrate", "export", "rewrite", "build", "load", "verify", "evaluate")


def test_every_public_name_resolves_and_stays_what_it_is():
    for name in ce.__all__:
        first = getattr(ce, name)
        for home in set(ce._HOME.values()):
            import_module(home)
        assert getattr(ce, name) is first
    assert all(callable(getattr(ce, name)) for name in DOCUMENTED)


def test_no_public_name_is_also_a_subpackage():
    program = (
        "import pkgutil, chai_export as ce\n"
        "clash = set(ce.__all__) & {module.name for module in pkgutil.iter_modules(ce.__path__)}\n"
        "assert not clash, clash\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(ce, "frobnicate")


def test_the_version_is_the_same_everywhere():
    root = Path(__file__).parents[2]
    stated = {
        "pyproject.toml": r'^version = "([^"]+)"$',
        "CMakeLists.txt": r"^project\(chai_export VERSION (\S+) ",
        "chai_export/version.py": r'^__version__ = "([^"]+)"$',
    }
    found = {name: re.findall(pattern, (root / name).read_text(), re.M) for name, pattern in stated.items()}
    assert found == {name: [ce.__version__] for name in stated}
