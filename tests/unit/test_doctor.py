"""Doctor asks each native library for a known answer of its version of the op."""

from __future__ import annotations

import pytest

from chai_export.engines import doctor
from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, ONNXRUNTIME_LIBRARY_V2, SWITCH, find_library

LIBRARIES = {
    "onnxruntime, native library": ONNXRUNTIME_LIBRARY,
    "onnxruntime, native library for pages": ONNXRUNTIME_LIBRARY_V2,
}


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.diagnose() if finding.name in LIBRARIES}


def test_libraries_that_are_there_give_the_known_answer():
    for name, finding in findings().items():
        assert finding.works == (find_library(LIBRARIES[name]) is not None)


def test_libraries_that_are_not_built_are_named(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    for name, finding in findings().items():
        assert not finding.works
        assert finding.found.startswith(f"lib{LIBRARIES[name]}.so was not built")
        assert "pip install" in finding.fix


def test_a_library_of_the_other_version_is_found_out(monkeypatch):
    built = {stem: find_library(stem) for stem in LIBRARIES.values()}
    if None in built.values():
        pytest.skip("the native libraries were not built")
    exchanged = dict(zip(built, reversed(built.values()), strict=True))
    monkeypatch.setattr(doctor, "find_library", exchanged.__getitem__)
    for finding in findings().values():
        assert not finding.works
        assert finding.fix
