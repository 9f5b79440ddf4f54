"""Doctor asks the native library for a known answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from chai_export.engines import doctor
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, SWITCH, find_library


def finding() -> doctor.Finding:
    return next(each for each in doctor.diagnose() if each.name == "onnxruntime, native library")


def test_a_library_that_is_there_gives_the_known_answer():
    assert finding().works == (find_library(ONNXRUNTIME_LIBRARY) is not None)


def test_a_library_that_is_not_built_is_named(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    found = finding()
    assert not found.works
    assert found.found.startswith("libchai_onnxruntime.so was not built")
    assert "pip install" in found.fix


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_library_that_does_not_load_is_found_out(monkeypatch, tmp_path, content):
    damaged: Path = tmp_path / "libchai_onnxruntime.so"
    damaged.write_bytes(content)
    monkeypatch.setattr(doctor, "find_library", lambda name: damaged)
    assert not finding().works
    assert finding().fix
