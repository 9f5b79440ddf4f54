"""Settings that must be in place before any test module is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

GPU_DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))

# Triton reads this when it is first imported, by whichever test comes first: without a GPU the kernels' tests
# run in its interpreter.
if not any(file.exists() for file in GPU_DEVICE_FILES):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def share_a_folder() -> None:
    """Where the processes of a test run share what is expensive (tests/helpers/exported.py).

    The first process makes it and removes it at its end; pytest-xdist's workers inherit its name.
    """
    if "CHAI_TESTS_SHARED" in os.environ:
        return
    folder, owner = tempfile.mkdtemp(prefix="chai-tests-shared-"), os.getpid()
    os.environ["CHAI_TESTS_SHARED"] = folder

    def remove() -> None:
        if os.getpid() == owner:  # not in what it forks
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


share_a_folder()
