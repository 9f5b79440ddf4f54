"""What tests of several files ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from chai_export.runtime.native import ONNXRUNTIME_LIBRARY, SWITCH, find_library


@pytest.fixture(scope="module", params=["function body", "library"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations of the op; the library where it was built."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0" if request.param == "function body" else "1"
    try:
        if request.param == "library" and find_library(ONNXRUNTIME_LIBRARY) is None:
            pytest.skip("libchai_onnxruntime.so was not built")
        yield request.param
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before
