"""The native sources build without warnings, and run clean under AddressSanitizer and UBSan."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.native_build import build, needs_tools, succeed

pytestmark = needs_tools


@pytest.fixture(scope="module")
def sanitized_build():
    return build("sanitize", "-DCHAI_SANITIZE=ON", "-DCHAI_BUILD_TESTS=ON")


def test_native_tests_pass_under_sanitizers(sanitized_build):
    output = succeed("ctest", "--test-dir", sanitized_build, "--output-on-failure", "--parallel", 2)
    assert "100% tests passed" in output
    assert "Skipped" not in output
    assert "runner_bundle_test" in output


def test_case_suite_passes_under_sanitizers(sanitized_build):
    runtimes = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
        for name in ("asan", "ubsan")
    ]
    library = sanitized_build / "plugins" / "op" / "onnxruntime" / "libchai_onnxruntime.so"
    output = succeed(
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
        *("tests/parity/test_native.py", "tests/parity/test_native_shared.py"),
        *("-k", "(library_agrees and float32) or refused or random_calls"),
        LD_PRELOAD=" ".join(runtime.stdout.strip() for runtime in runtimes),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter's own
        CHAI_TEST_LIBRARY=str(library),
    )
    assert " passed" in output or "[100%]" in output
