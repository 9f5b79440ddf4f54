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


@pytest.mark.parametrize(
    ("version", "variable", "chosen"),
    [
        ("", "CHAI_TEST_LIBRARY", "library_agrees or refused or random_calls"),
        ("_v2", "CHAI_TEST_LIBRARY_V2", "(library_agrees and float32) or refused or random_calls"),
    ],
    ids=["version_1", "version_2"],
)
def test_case_suite_passes_under_sanitizers(sanitized_build, version, variable, chosen):
    runtimes = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
        for name in ("asan", "ubsan")
    ]
    tests = ["test_native_v2"] if version else ["test_native", "test_native_shared"]
    library = sanitized_build / "plugins" / "op" / "onnxruntime" / f"libchai_onnxruntime{version}.so"
    output = succeed(
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
        *(f"tests/parity/{name}.py" for name in tests),
        *("-k", chosen),
        LD_PRELOAD=" ".join(runtime.stdout.strip() for runtime in runtimes),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter's own
        **{variable: str(library)},
    )
    assert " passed" in output or "[100%]" in output
