"""One schema of manifest.json: the table that the reader of the C++ runner is tested with, too."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from chai_export.bundle.bundle import Bundle
from chai_export.bundle.cpp_schema import header
from chai_export.errors import ChaiError

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "tests/data/manifest_cases.json").read_text())


def changed(case: dict[str, Any]) -> dict[str, Any]:
    content = copy.deepcopy(TABLE["base"])
    for path, value in case.get("set", []):
        parent_of(content, path)[path[-1]] = value
    for path in case.get("remove", []):
        del parent_of(content, path)[path[-1]]
    return content


def parent_of(content: dict[str, Any], path: list[str]) -> dict[str, Any]:
    for key in path[:-1]:
        content = content[key]
    return content


def write(directory: Path, content: dict[str, Any]) -> Path:
    for name in TABLE["base"]["files"]:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    (directory / "manifest.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("case", TABLE["cases"], ids=lambda case: case["name"])
def test_a_manifest_is_taken_or_refused_in_one_line(case, tmp_path):
    bundle = write(tmp_path / "bundle", changed(case))
    if case["usable"]:
        Bundle.load(bundle)
        return
    with pytest.raises(ChaiError) as caught:
        Bundle.load(bundle)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(bundle))
    assert "again" in message


@pytest.mark.parametrize("layout", TABLE["layouts"], ids=lambda layout: layout["name"])
def test_a_link_may_not_lead_out_of_the_bundle(layout, tmp_path):
    bundle = write(tmp_path / "bundle", TABLE["base"])
    (bundle / "other").touch()
    (tmp_path / "beside").touch()
    (tmp_path / "folder beside").mkdir()
    (tmp_path / "folder beside" / "file").touch()
    for name, target in layout["links"].items():
        path = bundle / name
        if path.is_dir():
            (path / "file").unlink()
            path.rmdir()
        else:
            path.unlink()
        os.symlink(target, path)
    if layout["usable"]:
        Bundle.load(bundle)
        return
    with pytest.raises(ChaiError) as caught:
        Bundle.load(bundle)
    assert "\n" not in str(caught.value)


def test_the_cpp_schema_is_made_from_the_manifest():
    assert (ROOT / "plugins/runner/manifest_schema.h").read_text() == header(), (
        "run `python -m chai_export.bundle.cpp_schema > plugins/runner/manifest_schema.h`"
    )
